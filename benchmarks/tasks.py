"""Figures of the tasks that begin from an image, for docs/tasks.md.

    python benchmarks/tasks.py [--only colorize restore] [--model MODEL] [--data PATH]
                               [--images 32] [--grids DIR]

Each image of the data set (the package's examples by default) is degraded, given to the task, and
the result compared with the original.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from latentdiff import LatentDiffusionPipeline
from latentdiff.colour import to_lab, to_srgb, with_lightness
from latentdiff.data.source import DataConfig
from latentdiff.diffusion.operators import Blur, Downsample, Jpeg
from latentdiff.evaluation.metrics import ClassifierFeatures
from latentdiff.evaluation.reference import open_reference
from latentdiff.images import grid, to_pil
from latentdiff.models.autoencoder_losses import PerceptualDistance

Images = list[Image.Image]
CALL: dict[str, Any] = {"seed": 0, "progress": False}


class Bench(NamedTuple):
    """What is measured with."""

    pipeline: LatentDiffusionPipeline
    originals: Images
    names: list[str]
    """What each shows."""
    grids: Path | None
    """Where to put images of inputs and results."""

    def show(self, name: str, rows: list[Images]) -> None:
        """Write some of the images: a column for each, a row for each kind."""
        if self.grids:
            self.grids.mkdir(parents=True, exist_ok=True)
            shown = [image for row in rows for image in row[:8]]
            grid(shown, columns=len(rows[0][:8])).save(self.grids / f"{name}.png")


def unit(images: Images) -> Tensor:
    """(N, 3, H, W) in 0 … 1, float64."""
    return torch.from_numpy(np.stack([np.array(i) for i in images])).permute(0, 3, 1, 2) / 255.0


def off(ours: Tensor, given: Images) -> str:
    """The largest difference of two images in 1/255."""
    return f"{float((ours - unit(given)).abs().max()) * 255:.2f}/255"


# --- colorize -----------------------------------------------------------------------------------


def colourfulness(images: Images) -> Tensor:
    """(N,): 0 is grey (Hasler & Süsstrunk 2003, section 7)."""
    red, green, blue = (unit(images) * 255).flatten(2).unbind(1)
    both = torch.stack([red - green, (red + green) / 2 - blue])
    return both.std(-1).norm(dim=0) + 0.3 * both.mean(-1).norm(dim=0)


def one_hue(originals: Images) -> Images:
    """Grey images in a hue each, drawn at random, of the original's mean chroma."""
    lab = to_lab(unit(originals))
    angles = torch.rand(len(lab), generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    chroma = lab[:, 1:].norm(dim=1).mean((1, 2)) * torch.stack([angles.cos(), angles.sin()])
    flat = chroma.T[:, :, None, None].expand(-1, -1, *lab.shape[-2:])
    return to_pil(with_lightness(to_srgb(torch.cat([lab[:, :1], flat], 1)), lab[:, :1]))


def colorize(bench: Bench) -> str:
    """Colourfulness and features of images that were made grey."""
    originals, names = bench.originals, bench.names
    lightness = to_lab(unit(originals))[:, :1]
    grey = to_pil(with_lightness(torch.zeros_like(unit(originals)), lightness))
    found = {
        "grey": grey,
        "one random hue": one_hue(originals),
        **{
            f"image_to_image, strength {s}": bench.pipeline.image_to_image(
                names, grey, strength=s, **CALL
            ).images
            for s in (0.4, 0.6, 0.8)
        },
        "colorize, no prompt": bench.pipeline.colorize(grey, **CALL).images,
        "colorize": bench.pipeline.colorize(grey, names, **CALL).images,
        "colorize, guidance 5": bench.pipeline.colorize(
            grey, names, guidance_scale=5.0, **CALL
        ).images,
    }
    network, wanted = ClassifierFeatures(), colourfulness(originals)
    features = F.normalize(network(originals), dim=1)
    lines = [
        "| | colourfulness off by | feature distance | largest change of L |",
        "|---|---|---|---|",
    ]
    for name, images in found.items():
        wrong = (colourfulness(images) - wanted).abs().mean()
        far = 1 - (F.normalize(network(images), dim=1) * features).sum(1).mean()
        change = (to_lab(unit(images))[:, :1] - to_lab(unit(grey))[:, :1]).abs().max() * 2.55
        lines.append(f"| {name} | {wrong:.1f} | {far:.3f} | {change:.1f}/255 |")
    bench.show("colorize", [originals, *found.values()])
    return "\n".join(lines)


# --- restore and upscale ------------------------------------------------------------------------


class Degradation(NamedTuple):
    """Degraded images, and how they are repaired."""

    given: Images
    repair: Callable[[], Any]
    agreement: Callable[[Images], str]
    """How nearly the result, degraded again, is what was given."""


def degradations(bench: Bench) -> dict[str, Degradation]:
    """What is repaired, by name."""
    pipeline, clean = bench.pipeline, unit(bench.originals)
    size = clean.shape[-2], clean.shape[-1]
    random = torch.Generator().manual_seed(0)
    found = {}
    for noise in (0.1, 0.2):
        noisy = to_pil((clean + noise * torch.randn(clean.shape, generator=random)).clamp(0, 1))

        def residual(images: Images, noisy: Images = noisy, noise: float = noise) -> str:
            taken, inside = unit(noisy) - unit(images), (unit(noisy) % 1) > 0
            return f"deviation {float(taken[inside].square().mean().sqrt()) / noise:.2f} σ"

        found[f"noise, σ = {noise}"] = _restoring(pipeline, noisy, residual, "denoise", noise=noise)
    blur = Blur(size, 1.5)
    blurred = to_pil(blur.apply(clean).clamp(0, 1))
    found["blur of 1.5 px"] = _restoring(
        pipeline, blurred, lambda images: off(blur.apply(unit(images)), blurred), "deblur"
    )
    for quality in (10, 30):
        files = [_jpeg(image, quality) for image in bench.originals]
        code = Jpeg(size, quality)

        def changed(images: Images, code: Jpeg = code, files: Images = files) -> str:
            ours, theirs = (code.measure(unit(i) * 2 - 1) for i in (images, files))
            return f"{100 * float(((ours - theirs).abs() > 0.5).double().mean()):.2f} % of codes"

        found[f"JPEG, quality {quality}"] = _restoring(
            pipeline, files, changed, "jpeg", quality=quality
        )
    for scale in (2, 4):
        area = Downsample(size, (size[0] // scale, size[1] // scale))
        small = to_pil(area.apply(clean))
        found[f"enlarged {scale}×"] = Degradation(
            small,
            lambda small=small, scale=scale: pipeline.upscale(small, scale, **CALL).images,  # type: ignore[misc]
            lambda images, area=area, small=small: off(area.apply(unit(images)), small),  # type: ignore[misc]
        )
    return found


def _restoring(
    pipeline: LatentDiffusionPipeline,
    given: Images,
    agreement: Callable[[Images], str],
    kind: Any,
    **options: Any,
) -> Degradation:
    return Degradation(
        given, lambda: pipeline.restore(given, kind, **options, **CALL).images, agreement
    )


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def restore(bench: Bench) -> str:
    """LPIPS to the original."""
    network = PerceptualDistance()
    clean = bench.originals

    def distance(images: Images) -> float:
        return float(network(*(unit(i).float() * 2 - 1 for i in (images, clean))).mean())

    lines = [
        "| | bicubic, or as given | median filter | through the autoencoder | ours | agreement |",
        "|---|---|---|---|---|---|",
    ]
    vae = bench.pipeline.autoencoder
    for name, (given, repair, agreement) in degradations(bench).items():
        bicubic = [image.resize(clean[0].size, Image.Resampling.BICUBIC) for image in given]
        median = [image.filter(ImageFilter.MedianFilter(3)) for image in bicubic]
        coded = to_pil(vae.decode(vae.encode(unit(bicubic).float() * 2 - 1)) / 2 + 0.5)
        ours = repair()
        cells = [f"{distance(images):.3f}" for images in (bicubic, median, coded, ours)]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {agreement(ours)} |")
        print(lines[-1], file=sys.stderr)
        bench.show(name.replace(" ", "-"), [clean, bicubic, median, ours])
    return "\n".join(lines)


# --- inpaint ------------------------------------------------------------------------------------


def blobs(count: int, size: tuple[int, int]) -> Images:
    """Masks of an ellipse each across the middle, some of them over the border."""
    height, width = size
    found = []
    for random in np.random.default_rng(0).random((count, 4)):
        x, y = width * (0.3 + 0.6 * random[0]), height * (0.3 + 0.4 * random[1])
        a, b = width * (0.15 + 0.2 * random[2]), height * (0.15 + 0.2 * random[3])
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((x - a, y - b, x + a, y + b), fill=255)
        found.append(mask)
    return found


def across(images: Tensor, masks: Tensor) -> Tensor:
    """(N,): the mean difference of neighbours on both sides of the mask's border."""
    total, pairs = torch.zeros(len(images)).double(), torch.zeros(len(images)).double()
    for dim in (-2, -1):
        border = masks.diff(dim=dim).abs()
        step = images.double().diff(dim=dim).abs().mean(1, keepdim=True)
        total += (step * border).flatten(1).sum(1)
        pairs += border.flatten(1).sum(1)
    return total / pairs


def inpaint(bench: Bench) -> str:
    """The gradient across the mask's border, and whether the surroundings are used."""
    pipeline, originals = bench.pipeline, bench.originals
    clean, count = unit(originals), len(originals)
    drawn = blobs(count, (clean.shape[-2], clean.shape[-1]))
    masks = torch.stack([torch.from_numpy(np.array(mask)) for mask in drawn])[:, None] / 255.0
    latents = pipeline.inpaint(bench.names, originals, drawn, output_type="latent", **CALL).images
    raw = unit(to_pil(pipeline.autoencoder.decode(latents) / 2 + 0.5))
    pasted = to_pil(torch.where(masks > 0, raw, clean))
    ours = pipeline.inpaint(bench.names, originals, drawn, **CALL).images
    lines = ["| | seam: median ratio | 0.85 … 1.15 | pixels changed outside |", "|---|---|---|---|"]
    for name, images in (("as painted", pasted), ("inpaint", ours)):
        ratio = across(unit(images), masks) / across(clean, masks)
        within = ((ratio > 0.85) & (ratio < 1.15)).double().mean()
        changed = int(((unit(images) != clean) & (masks == 0)).sum())
        lines.append(f"| {name} | {ratio.median():.2f} | {100 * within:.0f} % | {changed} |")
    network = ClassifierFeatures()

    def hits(surroundings: Images) -> Tensor:
        """Whether what was filled in without a prompt is nearest to its own image there."""
        filled = unit(pipeline.inpaint("", surroundings, drawn, **CALL).images)
        features = [
            F.normalize(network(to_pil(torch.where(masks > 0, images, 1.0))), dim=1)
            for images in (filled, clean)
        ]
        return ((features[0] @ features[1].T).argmax(1) == torch.arange(count)).double()

    seen, blank = hits(originals), hits([Image.new("RGB", o.size, "white") for o in originals])
    gain = seen - blank
    margin = 1.96 * float(gain.std()) / count**0.5
    lines.append(
        f"\nRecognised without a prompt: {100 * seen.mean():.0f} %, with blank surroundings "
        f"{100 * blank.mean():.0f} %; difference {100 * gain.mean():.0f} ± {100 * margin:.0f} %"
    )
    bench.show("inpaint", [originals, drawn, pasted, ours])
    return "\n".join(lines)


TASKS: dict[str, Callable[[Bench], str]] = {
    "colorize": colorize,
    "restore": restore,
    "inpaint": inpaint,
}


@torch.no_grad()
def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--model", help="folder, file or hub id; default: the embedded one")
    parser.add_argument("--data", help="captioned images; default: the package's examples")
    parser.add_argument("--images", type=int, default=32, help="how many; default: 32")
    parser.add_argument("--grids", type=Path, metavar="DIR", help="where to put images")
    args = parser.parse_args()
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model)
    reference = open_reference(DataConfig(path=args.data), args.images, pipeline.default_size[0])
    bench = Bench(pipeline, reference.one_each(), reference.prompts, args.grids)
    for name in args.only:
        print(f"## {name}\n\n{TASKS[name](bench)}\n")


if __name__ == "__main__":
    main()
