"""Both towers of a CLIP: how well an image and a text belong together.

Source: Radford et al. 2021, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.models.clip_text import TextEncoder, load_text_encoder

#: Files beside `text_encoder/` that hold what a text-to-image model does not need.
IMAGE_TOWER, HEAD = "image_encoder", "clip_head.safetensors"
#: The text tower of the scorer, where the model's own has since learnt something else.
TEXT_TOWER = "clip_text_encoder"


def scorer_text_tower(root: Path) -> TextEncoder:
    """The text tower that belongs to the image tower: its own folder, or the model's."""
    own = root / TEXT_TOWER
    return load_text_encoder(own if own.is_dir() else root / "text_encoder", root / "tokenizer")


class ClipScorer(nn.Module):
    """Frozen towers with a shared space of unit vectors.

    Args:
        text: the text tower and its tokenizer.
        image: a transformers CLIPVisionModelWithProjection.
        projection: text width → shared space, (D, width).
    """

    projection: Tensor

    def __init__(self, text: TextEncoder, image: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.text, self.image = text, image
        self.register_buffer("projection", projection.float())
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, D)."""
        return F.normalize(self.text.pooled(texts).float() @ self.projection.T, dim=1)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Return unit vectors (N, D) of images (N, 3, H, W) in [−1, 1]; resized as needed."""
        side: Any = self.image.config.image_size  # type: ignore[union-attr]
        if images.shape[-1] != side or images.shape[-2] != side:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        return F.normalize(self.image(pixel_values=images).image_embeds.float(), dim=1)


def load_clip_scorer(folder: str | Path) -> ClipScorer:
    """Load both towers from a model folder that has an image tower.

    Raises: UserError: when the folder has none.
    """
    from safetensors.torch import load_file
    from transformers.models.clip import CLIPVisionModelWithProjection

    root = Path(folder)
    for part in (IMAGE_TOWER, HEAD):
        if not (root / part).exists():
            raise UserError(
                f"{root} has no {part}, so it cannot score images against texts. Use the "
                "embedded model's folder, or one that training/embed.py wrote."
            )
    text = scorer_text_tower(root)
    image = CLIPVisionModelWithProjection.from_pretrained(root / IMAGE_TOWER).float()
    return ClipScorer(text.float(), image, load_file(root / HEAD)["text_projection.weight"])
