"""How well a model finds the clean latents, level by level.

    python benchmarks/denoising_error.py [MODEL_FOLDER ...] [--images 64] [--text FOLDER]
                                         [--reference FOLDER]

Prints the mean squared error of the predicted x_0 from noisy latents x_t of captioned images
(examples/twemoji), each with the prompt that names it and fixed noise. At t = 999 of a
schedule that ends in pure noise that is how well the prompt alone says the image; at the small
levels, how fine the details are. The latents' variance about their mean stands beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.data.source import DataConfig
from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.prediction import to_x_0
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import command
from latentdiff.evaluation.metrics import clean_latents
from latentdiff.evaluation.reference import open_reference
from latentdiff.formats.folder import load_components
from latentdiff.models.clip_text import TextEncoder, load_text_encoder

LEVELS = (999, 900, 750, 600, 400, 200, 50)


@torch.no_grad()
def errors(
    folder: Path, text: TextEncoder | None, count: int, data: DataConfig
) -> tuple[list[float], float]:
    """Mean squared error of x_0 at every level, and the variance of x_0 about its mean image."""
    parts: Any = load_components(folder)
    side = parts.unet.config.sample_size * parts.autoencoder.downscale
    reference = open_reference(data, count, side)
    x_0 = clean_latents(reference.one_each(), parts.autoencoder)
    context = (text or parts.text_encoder).encode(reference.prompts).float()
    unet, schedule = parts.unet.float(), NoiseSchedule(parts.schedule)
    eps = batch_noise(range(len(x_0)), x_0.shape[1:])
    found = []
    for level in LEVELS:
        t = torch.full((len(x_0),), level)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = schedule.q_sample(x_0, eps, t)
        said = to_x_0(parts.prediction, unet(x_t, t, context), x_t, alpha, sigma)
        found.append(float((said - x_0).square().mean()))
    return found, float((x_0 - x_0.mean(0)).square().mean())


@command
def main(arguments: list[str] | None = None) -> int:
    """Measure the models named, or the embedded one."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("models", nargs="*", type=Path, default=[EMBEDDED_MODEL])
    parser.add_argument("--images", type=int, default=64, help="at most; 2 or more")
    parser.add_argument("--reference", help="folder of captioned images")
    parser.add_argument("--text", type=Path, help="folder whose text_encoder/ is taken instead")
    given = parser.parse_args(arguments)
    text = given.text and load_text_encoder(given.text / "text_encoder", given.text / "tokenizer")
    print("model".ljust(40), *(f"t={level}".rjust(8) for level in LEVELS), "variance".rjust(9))
    for folder in given.models:
        data = DataConfig(path=given.reference)
        found, variance = errors(folder, text, given.images, data)
        row = [f"{error:8.4f}" for error in found]
        print(str(folder)[-40:].ljust(40), *row, f"{variance:9.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
