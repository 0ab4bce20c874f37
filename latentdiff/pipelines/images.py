"""From image tensors to what users want to hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.pipelines.inputs import check_steps

if TYPE_CHECKING:
    from PIL.Image import Image


def to_output(images: Tensor, output_type: str) -> Any:
    """Convert images (B, 3, H, W) in [−1, 1]; latents pass through.

    Returns: pil: list of PIL images; np: (B, H, W, 3) in 0 … 1; pt: (B, 3, H, W) in 0 … 1;
             latent: the tensor as it is.
    """
    if output_type == "latent":
        return images
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    pixels = unit.cpu().permute(0, 2, 3, 1).numpy()
    return pixels if output_type == "np" else to_pil(unit)


def to_pil(unit: Tensor) -> list[Image]:
    """PIL images of (B, 3, H, W) in 0 … 1, rounded to 8 bit."""
    from PIL import Image

    pixels = (unit * 255).round().to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture (B, 3, H, W) in 0 … 1, in dB: (B,)."""
    return -10 * (images - reference).square().flatten(1).mean(1).log10()


def grid(images: Sequence[Image], columns: int | None = None, gap: int = 2) -> Image:
    """One picture of several of equal size, row by row on white.

    Args:    columns: None for about as many as rows.  gap: pixels between pictures.
    Raises:  UserError: columns below 1.
    """
    from PIL import Image

    columns = round(len(images) ** 0.5 + 0.499) if columns is None else columns
    check_steps("columns", columns)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    canvas = Image.new("RGB", size, "white")
    for k, image in enumerate(images):
        canvas.paste(image, ((k % columns) * (width + gap), (k // columns) * (height + gap)))
    return canvas
