"""DDIM inversion of real images and back: PSNR against the autoencoder's own reconstruction.

    python benchmarks/inversion.py [--model FOLDER] [--images 16] [--output FILE.json]

50 steps, no guidance, images of examples/twemoji with their captions. The autoencoder's own
reconstruction is the reference, since nothing drawn from latents can be better. Ends with an error
when the mean is below --least dB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.data.source import DataConfig
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.evaluation.reference import open_reference
from latentdiff.images import psnr, to_output
from latentdiff.pipelines.generate import LatentDiffusionPipeline


@torch.no_grad()
def measure(model: Path, count: int, steps: int, iterations: int) -> dict[str, Any]:
    """Return every figure by name."""
    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    reference = open_reference(DataConfig(), count, pipeline.default_size[0])
    prompts = reference.prompts
    began = time.perf_counter()
    found = pipeline.invert(
        reference.one_each(),
        prompts,
        num_inference_steps=steps,
        iterations=iterations,
    )
    there = time.perf_counter() - began
    back = pipeline(
        prompts,
        latents=found.latents,
        sampler="ddim",
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="pt",
        progress=False,
    ).images
    kept = to_output(pipeline.autoencoder.decode(found.image_latents), "pt")
    decibels = psnr(back, kept)
    return {
        "images": count,
        "steps": steps,
        "network calls per step of the inversion": iterations,
        "mean PSNR, dB": round(float(decibels.mean()), 2),
        "least PSNR, dB": round(float(decibels.min()), 2),
        "standard deviation of x_T": round(float(found.latents.std()), 3),
        "seconds per inversion": round(there / count, 2),
    }


def main() -> None:
    """Print the figures, and write them when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--least", type=float, default=25.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.model, arguments.images, arguments.steps, arguments.iterations)
    for name, value in figures.items():
        print(f"{name:42} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    if figures["mean PSNR, dB"] < arguments.least:
        sys.exit(f"the mean PSNR is below {arguments.least} dB")


if __name__ == "__main__":
    main()
