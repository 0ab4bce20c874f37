"""A run as one HTML file that needs nothing else: curves, pictures, configuration, environment."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.trainer.curves import Line, chart, smoothed
from latentdiff.trainer.environment import read_environment
from latentdiff.trainer.output import SAMPLES
from latentdiff.trainer.tracking import METRICS, read_metrics

REPORT = "report.html"
#: Grids of more steps than this are left out evenly, the first and the last kept.
MAX_GRIDS = 12
_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; color: #222 }
table { border-collapse: collapse } td { padding: .1rem 1.2rem .1rem 0; vertical-align: top }
figure { display: inline-block; margin: .4rem; vertical-align: top } figcaption { color: #555 }
pre { background: #f6f6f6; padding: .8rem; overflow: auto } img { max-width: 30rem }
"""
Rows = list[dict[str, Any]]


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what the run has written so far. Returns: the file.

    Raises: UserError: the folder holds no metrics.jsonl.
    """
    if not (run / METRICS).is_file():
        raise UserError(f"{run} is not a run's folder: it has no {METRICS}.")
    file = run / REPORT
    temporary = file.with_name(f".tmp-{os.getpid()}-{REPORT}")
    temporary.write_text(report(run), encoding="utf-8")
    os.replace(temporary, file)
    return file


def report(run: Path) -> str:
    """The page as text."""
    rows = read_metrics(run / METRICS)
    config = run / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else "not recorded"
    title = html.escape(f"run {run.absolute().name}")
    return "".join(
        (
            f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{title}</title>",
            f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
            _table(summary(rows)),
            f"<h2>Curves</h2>{curves(rows)}",
            f"<h2>Pictures</h2>{_grids(run / SAMPLES)}",
            f"<h2>Configuration</h2><pre>{html.escape(settings)}</pre>",
            f"<h2>Environment</h2>{_environment(run)}",
            "</body></html>\n",
        )
    )


def summary(rows: Rows) -> dict[str, str]:
    """The figures at the top."""
    found = {"optimizer steps": str(max((row["step"] for row in rows), default=0))}
    trained = [row for row in rows if "loss" in row]
    found["steps skipped (not finite)"] = str(
        sum(row["loss"] is None or row.get("grad_norm") is None for row in trained)
    )
    names = {
        "seconds": "training time, s",
        "loss": "last training loss",
        "validation_loss": "last held-out loss",
        "images_per_second": "images/s",
        "mfu": "model FLOPs utilisation",
        "waiting": "share of time spent waiting for data",
        "peak_memory_mb": "peak memory, MB",
    }
    for key, name in names.items():
        if values := series(rows, key):
            found[name] = f"{values[-1][1]:.5g}"
    return found


def curves(rows: Rows) -> str:
    """Every chart, with a caption."""
    loss = series(rows, "loss")
    width = max(1, len(loss) // 40)
    quartiles = [Line(f"quartile {n}", series(rows, f"validation_loss_q{n}")) for n in range(1, 5)]
    training = [Line("every step", loss, faint=True), Line("mean", smoothed(loss, width))]
    charts = {
        "training loss": chart(training, logarithmic=True),
        "held-out loss, averaged weights": chart(
            [Line("held-out loss", series(rows, "validation_loss"))], logarithmic=True
        ),
        "held-out loss by quarter of the timesteps (1: least noise)": chart(
            quartiles, logarithmic=True
        ),
    }
    for key, name, logarithmic in (
        ("grad_norm", "gradient norm", True),
        ("lr", "learning rate", False),
        ("images_per_second", "images per second", False),
        ("mfu", "model FLOPs utilisation", False),
        ("waiting", "share of time spent waiting for data", False),
        ("peak_memory_mb", "peak memory, MB", False),
    ):
        charts[name] = chart([Line(name, series(rows, key))], logarithmic)
    return "".join(
        f"<figure>{svg}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, svg in charts.items()
    )


def series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a value."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _grids(folder: Path) -> str:
    files = sorted(folder.glob("step-*.png"))
    steps = sorted({file.stem.split("-")[1] for file in files})
    if not steps:
        return "<p>none</p>"
    last = len(steps) - 1
    count = min(len(steps), MAX_GRIDS)
    chosen = sorted({steps[round(i * last / max(1, count - 1))] for i in range(count)})
    parts = []
    for step in chosen:
        for file in (f for f in files if f.stem.split("-")[1] == step):
            weights = "newest weights" if file.stem.endswith("-raw") else "averaged weights"
            data = base64.b64encode(file.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="" src="data:image/png;base64,{data}">'
                f"<figcaption>step {int(step)}, {weights}</figcaption></figure>"
            )
    return "".join(parts)


def _environment(run: Path) -> str:
    starts = read_environment(run)
    if not starts:
        return "<p>not recorded</p>"
    return "".join(_table({k: v for k, v in start.items() if v is not None}) for start in starts)


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"
