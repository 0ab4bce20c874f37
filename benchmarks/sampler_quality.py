"""Quality of the embedded model's images against the number of evaluations, per sampler.

    python benchmarks/sampler_quality.py [--prompts 100] [--page docs/samplers.md]
                                         [--plot docs/images/sampler-quality.png]

An evaluation is one guided estimate: one call of the U-Net, on a batch that holds each image with
and without its prompt. The figure is the Fréchet distance in EfficientNet-Lite0 features between
the images of the evaluation's first prompts and those of examples/twemoji (not FID).
Finished cells are kept in --state for the same weights, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from latentdiff.data.source import DataConfig
from latentdiff.diffusion.samplers import SAMPLERS, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.evaluation.metrics import ClassifierFeatures, frechet_distance
from latentdiff.evaluation.reference import open_reference

BUDGETS = (5, 10, 20, 50)
Cells = dict[str, dict[str, float]]


def evaluations(name: str, steps: int) -> int:
    """Count the estimates that a sampler asks for in a run of `steps` steps."""
    schedule, asked, zero = NoiseSchedule(ScheduleConfig()), [], torch.zeros(1, 1, 2, 2)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return 0.5 * x_t

    grid = timestep_grid(schedule, steps, "trailing")
    sample(name, denoiser, zero + 1, schedule, grid, lambda step: zero)
    return len(asked)


def steps_within(name: str, budget: int) -> int:
    """The most steps whose evaluations fit a budget; 0 when one step is too many."""
    return max((n for n in range(1, budget + 1) if evaluations(name, n) <= budget), default=0)


def distance(pipeline: Any, name: str, steps: int, asked: list[str], gallery: Tensor) -> float:
    """Fréchet distance of one sampler's images to the real ones."""
    images = pipeline(asked, sampler=name, num_inference_steps=steps, seed=0, progress=False).images
    return frechet_distance(ClassifierFeatures()(images), gallery)


def table(cells: Cells) -> str:
    """Distances as Markdown, one row per sampler."""
    lines = [
        "| sampler | " + " | ".join(f"{b} evaluations" for b in BUDGETS) + " |",
        "|---|" + "---|" * len(BUDGETS),
    ]
    for name, row in cells.items():
        values = [f"{row[str(b)]:.1f}" if str(b) in row else "n/a" for b in BUDGETS]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def plot(cells: Cells, path: Path) -> None:
    """Distance against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for i, (name, row) in enumerate(cells.items()):
        budgets = [int(b) for b in row]
        axes.plot(budgets, list(row.values()), marker="osv^DPX<>*hp"[i], markersize=5, label=name)
    axes.set(xscale="log", xlabel="evaluations", ylabel="Fréchet distance (Lite0 features)")
    axes.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def measure(model: str | None, count: int, state: Path) -> Cells:
    """Fill every cell that `state` does not hold yet."""
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(*([model] if model else []))
    reference = open_reference(DataConfig(), 10_000, pipeline.default_size[0])
    gallery, asked = ClassifierFeatures()(reference.images), reference.prompts[:count]
    weights = sum(float(p.detach().double().sum()) for p in pipeline.unet.parameters())
    of = f"{count} prompts, weights {weights!r}"
    kept = json.loads(state.read_text()) if state.is_file() else {}
    cells: Cells = kept.get("cells", {}) if kept.get("of") == of else {}
    for name in SAMPLERS:
        row = cells.setdefault(name, {})
        for budget in BUDGETS:
            steps = steps_within(name, budget)
            if str(budget) in row or not steps:
                continue
            row[str(budget)] = distance(pipeline, name, steps, asked, gallery)
            print(
                f"{name}: {budget} evaluations, {steps} steps: {row[str(budget)]:.1f}", flush=True
            )
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps({"of": of, "cells": cells}))
    return cells


def main() -> None:
    """Measure, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", help="model folder; the embedded model without it")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--state", type=Path, default=Path("runs/sampler_quality.json"))
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    cells = measure(arguments.model, arguments.prompts, arguments.state)
    print(table(cells))
    if arguments.plot:
        plot(cells, arguments.plot)
    if arguments.page:
        from sampler_parity import write_between

        write_between(arguments.page, "sampler quality", table(cells))


if __name__ == "__main__":
    main()
