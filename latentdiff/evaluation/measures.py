"""Everything that evaluate.py measures of a model on the embedded data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.emoji import Drawing, EmojiSource, Rendering
from latentdiff.data.styles import BACKGROUNDS, STYLES
from latentdiff.data.transforms import to_tensor
from latentdiff.evaluation.features import Features
from latentdiff.evaluation.prompts import Asked
from latentdiff.evaluation.statistics import (
    classify,
    fit_classifier,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    ranks,
    share_within,
)
from latentdiff.models.clip_scorer import ClipScorer
from latentdiff.models.perceptual import PerceptualDistance

Pictures = list[Image.Image]
#: Concepts that the style classifier learns from.
STYLE_EXAMPLES = 300


class Shown(NamedTuple):
    """One generated picture on the page."""

    prompt: str
    ours: Image.Image
    real: Image.Image | None = None
    miss: str = ""
    """What is not as asked, in words."""


@dataclass
class Result:
    """Figures by name, and the pictures behind them by section."""

    figures: dict[str, Any] = field(default_factory=dict)
    pages: dict[str, list[Shown]] = field(default_factory=dict)


class Generator:
    """Prompts to pictures in fixed batches, each prompt with a seed of its own; keeps the time."""

    def __init__(self, pipeline: Any, steps: int, guidance: float, batch_size: int) -> None:
        self.pipeline, self.steps, self.guidance = pipeline, steps, guidance
        self.batch_size, self.seconds, self.count = batch_size, 0.0, 0

    def __call__(self, prompts: Sequence[str], seed: int = 0) -> Pictures:
        """Generate; prompt number i has seed + i."""
        images: Pictures = []
        for start in range(0, len(prompts), self.batch_size):
            began = time.perf_counter()
            images += self.pipeline(
                list(prompts[start : start + self.batch_size]),
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                seed=seed + start,
                progress=False,
            ).images
            self.seconds += time.perf_counter() - began
        self.count += len(prompts)
        return images


def real_pictures(renderings: Sequence[Rendering], size: int) -> Pictures:
    """Draw renderings."""
    source = EmojiSource(list(renderings), size)
    return [source[i].image for i in range(len(source))]


def as_tensors(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, H, W) in [−1, 1] at the pictures' own size."""
    return torch.stack([to_tensor(image, image.width) for image in images])


@torch.no_grad()
def through_vae(images: Pictures, autoencoder: Any) -> Pictures:
    """Encode and decode pictures."""
    from latentdiff.pipelines.pictures import to_output

    found: Pictures = []
    for start in range(0, len(images), 32):
        pixels = as_tensors(images[start : start + 32]).to(autoencoder.device)
        found += to_output(autoencoder.decode(autoencoder.encode(pixels)), "pil")
    return found


@torch.no_grad()
def real_latents(renderings: Sequence[Rendering], size: int, autoencoder: Any) -> Tensor:
    """The clean latents (N, C, h, w) of real pictures: the mean of what the encoder says."""
    found = []
    for start in range(0, len(renderings), 64):
        pixels = as_tensors(real_pictures(renderings[start : start + 64], size))
        moments = autoencoder.encode_moments(pixels.to(autoencoder.device))
        found.append(autoencoder.latents_from_moments(moments))
    return torch.cat(found)


def ground_of(image: Image.Image, border: int = 3) -> str:
    """The background word nearest to the median colour of a picture's border."""
    pixels = np.asarray(image.convert("RGB"), np.float64)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[border:-border, border:-border] = True
    colour = np.median(pixels[~inside], axis=0)
    return min(BACKGROUNDS, key=lambda word: float(np.sum((colour - BACKGROUNDS[word]) ** 2)))


def concepts(
    asked: Sequence[Asked], ours: Tensor, rebuilt: Tensor, gallery: Tensor
) -> dict[str, Any]:
    """Concept accuracy and distances to the real set, with the autoencoder's ceiling.

    Args: ours, rebuilt: features (N, D) of what was generated, of real pictures through the VAE.
    """
    rows = [item.row for item in asked]
    figures: dict[str, Any] = {"gallery": len(gallery), "prompts": len(asked)}
    for name, found in (("", ours), ("real through VAE: ", rebuilt)):
        order = ranks(found, gallery, rows)
        figures |= {
            f"{name}concept top-1": share_within(order, 1),
            f"{name}concept top-5": share_within(order, 5),
            f"{name}Fréchet distance": frechet_distance(found, gallery),
            f"{name}kernel distance x1000": 1000 * kernel_distance(found, gallery),
            f"{name}nearest training picture, cosine distance": float(
                nearest_distance(found, gallery).mean()
            ),
        }
    real = gallery[rows]
    order = ranks(real, gallery, rows)
    figures["real: concept top-1"] = share_within(order, 1)
    figures["real: concept top-5"] = share_within(order, 5)
    figures["real: Fréchet distance"] = frechet_distance(real, gallery)
    return figures


def style_classifier(drawings: Sequence[Drawing], size: int, features: Features) -> Tensor:
    """Learn to tell the styles apart from real pictures of every fifth concept or so."""
    chosen = drawings[:: max(1, len(drawings) // STYLE_EXAMPLES)]
    examples = [Rendering(d, style, "white") for d in chosen for style in STYLES]
    labels = torch.arange(len(STYLES)).repeat(len(chosen))
    return fit_classifier(features(real_pictures(examples, size)), labels, len(STYLES))


def styles(
    asked: Sequence[Asked], found: Tensor, real: Tensor, classifier: Tensor
) -> dict[str, float]:
    """Style accuracy of generated pictures, and the classifier's on the real ones."""
    words = list(STYLES)
    wanted = torch.tensor([words.index(item.rendering.style) for item in asked])
    return {
        "style accuracy": float((classify(found, classifier) == wanted).double().mean()),
        "real: style accuracy": float((classify(real, classifier) == wanted).double().mean()),
    }


def grounds(asked: Sequence[Asked], images: Pictures, real: Pictures) -> dict[str, float]:
    """Share of pictures whose border has the colour that was asked for."""

    def share(pictures: Pictures) -> float:
        pairs = zip(asked, pictures, strict=True)
        return float(np.mean([ground_of(p) == a.rendering.background for a, p in pairs]))

    return {"background accuracy": share(images), "real: background accuracy": share(real)}


def compositions(
    asked: Sequence[Asked],
    found: Tensor,
    gallery_of: Callable[[str, str], Tensor],
) -> float:
    """Concept top-5 of pictures in any look, each against all concepts in that same look."""
    hits = []
    for item, vector in zip(asked, found, strict=True):
        gallery = gallery_of(item.rendering.style, item.rendering.background)
        hits += ranks(vector[None], gallery, [item.row])
    return share_within(hits, 5)


@torch.no_grad()
def diversity(groups: Sequence[Pictures], distance: PerceptualDistance) -> float:
    """Mean LPIPS over all pairs of pictures of one prompt, averaged over prompts."""
    means = []
    for images in groups:
        pixels = as_tensors(images)
        first, second = torch.triu_indices(len(images), len(images), 1)
        means.append(float(distance(pixels[first], pixels[second]).mean()))
    return float(np.mean(means))


@torch.no_grad()
def reconstruction(real: Pictures, rebuilt: Pictures, distance: PerceptualDistance) -> Any:
    """PSNR and LPIPS of the autoencoder's round trip."""
    a, b = as_tensors(real), as_tensors(rebuilt)
    error = ((a - b) / 2).square().flatten(1).mean(1)
    parts = [distance(a[i : i + 16], b[i : i + 16]) for i in range(0, len(a), 16)]
    return {
        "VAE PSNR, dB": float((-10 * error.log10()).mean()),
        "VAE LPIPS": float(torch.cat(parts).mean()),
    }


def clip_score(prompts: Sequence[str], images: Pictures, scorer: ClipScorer) -> float:
    """Mean cosine of text and picture by the model's own CLIP, times 100."""
    scores = scorer.text_features(prompts) * scorer.image_features(as_tensors(images))
    return 100 * float(scores.sum(1).mean())
