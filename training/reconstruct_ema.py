"""Build a model whose weights are averaged over another length than the run's own.

    python training/reconstruct_ema.py RUN --sigma-rel 0.1 [--step N] [--output FOLDER]

RUN is the output folder of a train_latent.py run with power_ema.every=N, finished or not. 0.05
averages over about the last twentieth of the run, 0.1 over the last tenth. Several lengths at once
(--sigma-rel 0.03 0.05 0.1) give a folder each, to be compared with `latentdiff evaluate`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.errors import UserError, command
from latentdiff.formats.folder import save_components
from latentdiff.train.config import read_config
from latentdiff.train.ema import reconstruct
from latentdiff.train.parts import load_parts

#: A profile further than this from the wanted one is another average; see `ema.misfit`.
POOR_FIT = 0.1


def write_model(run: Path, sigma_rel: float, step: int | None, output: Path | None) -> Path:
    """Reconstruct one average and write it as a model folder. Returns: the folder."""
    average = reconstruct(run, sigma_rel, step)
    print(f"sigma_rel {sigma_rel:g} at step {average.step}: misfit {average.misfit:.2%}")
    if average.misfit > POOR_FIT:
        print(
            f"note: the stored averages fit this length poorly ({average.misfit:.0%}); lengths "
            "between and a little above the tracked ones fit better, and so do more of them."
        )
    components, config, _ = load_parts(read_config(run / "config.yaml", []))
    parameters = dict(components.unet.named_parameters())
    if unknown := sorted(set(average.weights) - set(parameters)):
        raise UserError(f"{run} stored weights that its U-Net does not have: {unknown[0]}.")
    with torch.no_grad():
        for name, value in average.weights.items():
            parameters[name].copy_(value)
    folder = output or run / f"model-sigma-{sigma_rel:g}"
    return save_components(folder, components, getattr(torch, config.export.dtype))


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--sigma-rel", type=float, nargs="+", required=True, metavar="LENGTH")
    parser.add_argument("--step", type=int, help="where the average ends; default: the newest")
    parser.add_argument("--output", type=Path, help="default: RUN/model-sigma-LENGTH")
    options = parser.parse_args(arguments)
    if not (options.run / "config.yaml").is_file():
        raise UserError(f"{options.run} is not a run's folder: it has no config.yaml.")
    if options.output is not None and len(options.sigma_rel) > 1:
        raise UserError("--output names one folder; leave it out with several lengths.")
    for sigma_rel in options.sigma_rel:
        print(f"model: {write_model(options.run, sigma_rel, options.step, options.output)}")


if __name__ == "__main__":
    sys.exit(main())
