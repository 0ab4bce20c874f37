"""Plot the losses of a run: `python benchmarks/plot_run.py RUN --output curve.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np


def series(run: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one key of a run's metrics."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def main() -> None:
    """Draw the training loss (faint, and its running mean) and the held-out loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = series(arguments.run, "loss")
    width = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.6)
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label="training loss")
    held_out = series(arguments.run, "validation_loss")
    if held_out[0]:
        axes.plot(*held_out, "o-", color="tab:orange", label="held-out loss, averaged weights")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
