"""Is a generated image its own original? By pixels, and by what a classifier sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.metrics import ClassifierFeatures, to_tensors


def distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Euclidean distance of every pair of rows, (N, M)."""
    return torch.cdist(ours.flatten(1).double(), theirs.flatten(1).double())


def both_distances(
    generated: Sequence[Image.Image], originals: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """Distances by pixels and by features, (N, M) each."""
    size, features = generated[0].width, ClassifierFeatures()
    return {
        "pixels": distances(to_tensors(generated, size), to_tensors(originals, size)),
        "features": distances(features(generated), features(originals)),
    }


def own_share(matrix: Tensor) -> Tensor:
    """Distance to the own original over the mean distance to the others, (N,)."""
    count = len(matrix)
    own = matrix.diagonal()
    return own / ((matrix.sum(1) - own) / (count - 1))


def nearest_is_own(matrix: Tensor) -> int:
    """How many images are nearest to their own original."""
    return int((matrix.argmin(1) == torch.arange(len(matrix))).sum())
