"""One evaluation from prompts to figures, and what each wrong image was taken for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.evaluation import metrics
from latentdiff.evaluation.metrics import (
    ClassifierFeatures,
    Generator,
    Result,
    Shown,
    ranks,
)
from latentdiff.evaluation.reference import Reference
from latentdiff.models.autoencoder_losses import PerceptualDistance

#: Of so many prompts, so many images each tell how much the seed decides.
DIVERSE_PROMPTS, SEEDS = 12, 4


def measure(
    pipeline: Any,
    generator: Generator,
    reference: Reference,
    score: Any,
    say: Callable[[str], None],
) -> Result:
    """Generate every concept of the reference, and some with several seeds; compare.

    Args:
        pipeline: a LatentDiffusionPipeline.
        generator: see `Generator`.
        score: a ClipScorer, or None to leave the CLIP score out.
        say: receives a line before every longer step.
    Raises: UserError: a package of the `eval` extra is missing.
    """
    features, distance = ClassifierFeatures(pipeline.device), PerceptualDistance()
    prompts, result = reference.prompts, Result()
    say(f"features of {len(reference.images)} reference images")
    gallery = features(reference.images)
    say(f"{len(prompts)} concepts")
    images, real = generator(prompts), reference.one_each()
    found, rebuilt = features(images), metrics.through_vae(real, pipeline.autoencoder)
    figures = result.figures
    figures |= metrics.concepts(found, features(rebuilt), gallery, reference.labels)
    figures |= metrics.reconstruction(real, rebuilt, distance)
    if score is not None:
        figures["CLIP score"] = metrics.clip_score(prompts, images, score)
        figures["real: CLIP score"] = metrics.clip_score(prompts, real, score)
    misses = [concept_miss(own, one, gallery, reference) for own, one in enumerate(found)]
    result.pages["Concepts"] = list(map(Shown, prompts, images, real, misses))

    several = prompts[:DIVERSE_PROMPTS]
    say(f"{len(several)} prompts with {SEEDS} seeds each")
    groups = [generator([prompt] * SEEDS, seed=20_000) for prompt in several]
    result.pages["Seeds"] = [
        Shown(prompt, image)
        for prompt, images in zip(several, groups, strict=True)
        for image in images
    ]
    figures["diversity over seeds, LPIPS"] = metrics.diversity(groups, distance)
    figures["seconds per image"] = generator.seconds / generator.count
    return result


def concept_miss(own: int, found: Tensor, gallery: Tensor, reference: Reference) -> str:
    """Name the nearest concept and the place of the right one; empty if that is the first.

    Args: own: the concept asked for.  found: the image's features (D,).  gallery: (M, D), of the
          reference's images.
    """
    place = ranks(found[None], gallery, reference.labels, [own])[0]
    if place == 0:
        return ""
    cosines = F.normalize(gallery.double(), dim=1) @ found.double()
    seen = reference.prompts[int(reference.labels[cosines.argmax()])]
    return f"taken for {seen}, right one at {place + 1}"


def open_score(folder: Path) -> Any:
    """Open the model's own CLIP.

    Returns: a ClipScorer, or None when the folder has no image tower: then there is no CLIP score.
    """
    from latentdiff.models.clip_scorer import IMAGE_TOWER, load_clip_scorer

    return load_clip_scorer(folder) if (folder / IMAGE_TOWER).is_dir() else None


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures to four significant digits."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in figures.items()
    }


def device_words(device: torch.device) -> str:
    """Say what computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
