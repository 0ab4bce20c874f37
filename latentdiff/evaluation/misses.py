"""What each generated picture was taken for where it is not what was asked, in words."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.emoji import Drawing
from latentdiff.data.styles import STYLES
from latentdiff.evaluation.measures import ground_of
from latentdiff.evaluation.prompts import Asked
from latentdiff.evaluation.statistics import classify, ranks


def concept_miss(item: Asked, found: Tensor, gallery: Tensor, drawings: Sequence[Drawing]) -> str:
    """Name the nearest real picture and the place of the right one; empty if that is the first.

    Args: found: the picture's features (D,).  gallery: (M, D), one row per drawing.
    """
    place = ranks(found[None], gallery, [item.row])[0]
    if place == 0:
        return ""
    cosines = F.normalize(gallery.double(), dim=1) @ found.double()
    return f"taken for {drawings[int(cosines.argmax())].concept}, right one at {place + 1}"


def style_miss(item: Asked, found: Tensor, classifier: Tensor) -> str:
    """Name the style that the classifier sees; empty if it is the one that was asked for."""
    seen = list(STYLES)[int(classify(found[None], classifier))]
    return "" if seen == item.rendering.style else f"style: {seen}"


def ground_miss(item: Asked, image: Image.Image) -> str:
    """Name the ground that is there; empty if it is the one that was asked for."""
    seen = ground_of(image)
    return "" if seen == item.rendering.background else f"ground: {seen}"
