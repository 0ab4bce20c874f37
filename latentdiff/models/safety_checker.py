"""Stable Diffusion's safety checker: whether an image is near one of some concepts in CLIP's space.

    cos(image, concept) − threshold + 0.01 · (near a "special care" concept) > 0

The concepts are known as embeddings only. Names of the weights are those of diffusers' class.

Source: diffusers, pipelines/stable_diffusion/safety_checker.py; Rando et al. 2022,
        arXiv:2210.04610, which found out what most of the concepts are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.files import read_json
from latentdiff.weights import TEXT_STEM, load_weights, read_weights

#: CLIP's mean and standard deviation of red, green and blue in 0 … 1.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
#: Added to every concept's score when a special one is near; scores are rounded before.
_CARE, _DECIMALS = 0.01, 3


class SafetyChecker(nn.Module):
    """CLIP's image tower with the concepts."""

    concept_embeds: Tensor

    def __init__(self, tower: nn.Module, concepts: int, special: int, width: int) -> None:
        """Args: tower: transformers' CLIPVisionModelWithProjection.  width: of its embeddings."""
        super().__init__()
        self.tower: Any = tower
        for name, count in (("concept_embeds", concepts), ("special_care_embeds", special)):
            self.register_buffer(name, torch.empty(count, width))
            self.register_buffer(f"{name}_weights", torch.empty(count))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[bool]:
        """Which of the images (B, 3, H, W) in [−1, 1] are near a concept."""
        return self.flagged(self.prepared(images))

    def prepared(self, images: Tensor) -> Tensor:
        """What CLIP's tower takes: resized by the shorter side, cut in the middle, normalised."""
        side, shape = int(self.tower.config.image_size), images.shape[2:]
        size = [side * s // min(shape) for s in shape]
        unit = F.interpolate(images / 2 + 0.5, size=size, mode="bicubic", antialias=True)
        top, left = ((s - side) // 2 for s in size)
        unit = unit[:, :, top : top + side, left : left + side].clamp(0, 1)
        mean, deviation = (unit.new_tensor(x)[:, None, None] for x in (MEAN, DEVIATION))
        return (unit - mean) / deviation

    def flagged(self, pixels: Tensor) -> list[bool]:
        """The same of prepared images."""
        embedding = self.tower(pixel_values=pixels.to(self.concept_embeds)).image_embeds
        special, concepts = (
            self._scores(embedding, f"{kind}_embeds") for kind in ("special_care", "concept")
        )
        near = (special.round(decimals=_DECIMALS) > 0).any(1, keepdim=True)
        return ((concepts + _CARE * near).round(decimals=_DECIMALS) > 0).any(1).tolist()

    def _scores(self, embedding: Tensor, name: str) -> Tensor:
        known = F.normalize(getattr(self, name).float(), dim=1)
        return F.normalize(embedding.float(), dim=1) @ known.T - getattr(self, f"{name}_weights")


def load_safety_checker(folder: Path) -> SafetyChecker:
    """Read a checker, or that of a model folder which has one.

    Raises: UserError: there is none, or its weights do not fit.
    """
    from transformers.models.clip import CLIPVisionConfig, CLIPVisionModelWithProjection

    inner = folder / "safety_checker"
    folder = inner if inner.is_dir() else folder
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "vision_config" not in config:
        raise UserError(
            f"no safety checker at {folder}: expected config.json with a vision_config, as in "
            "CompVis/stable-diffusion-safety-checker."
        )
    # Older files name the tower within the tower.
    old, new = "vision_model.vision_model.", "vision_model."
    state = {
        name.replace(old, new): tensor
        for name, tensor in read_weights(folder, TEXT_STEM).items()
        if not name.endswith("position_ids")
    }
    own = ("concept_embeds", "special_care_embeds")
    concepts, special = (len(state.get(name, ())) for name in own)
    width = int(config.get("projection_dim", 512))
    with torch.device("meta"):
        fields = {**config["vision_config"], "projection_dim": width}
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**fields))
        checker = SafetyChecker(tower, concepts, special, width)
    names = {n if n.startswith(own) else f"tower.{n}": t for n, t in state.items()}
    load_weights(checker, names, folder, torch.float32)
    positions = torch.arange(tower.vision_model.embeddings.num_positions)
    tower.vision_model.embeddings.position_ids = positions[None]  # it is in no file
    return checker.eval().requires_grad_(False)
