"""Teaching a text tower what things look like, so that a U-Net has to learn less.

The states of the last positions, padding behind the end mark unless a caption is long, hold what
the causal tower has read; they learn to say the picture's latents patch by patch:

    L = mean |head(state_j) − patch_j|² + κ mean |end state − end state before|²

Otherwise a U-Net learns what 1,600 things look like through its cross-attention and at all noise
levels at once, which takes it many times longer than a regression without noise does.
The head is needed for training only; the tower stays a CLIP text tower, and κ keeps its end state,
which the CLIP score reads, where it was.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentdiff.data.source import DataConfig
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.trainer.stage import StageConfig


@dataclass(frozen=True)
class DrawingConfig:
    """Everything that teach_drawing.py needs."""

    model: str = "embedded"
    """Model folder whose text tower is taught, or `embedded`; its autoencoder gives the latents."""
    patch: int = 4
    """Side of a patch in latent positions."""
    keep_weight: float = 0.1
    """κ, the weight of keeping the end state."""
    momentum: float = 0.95
    """Of the optimizer, Muon."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned pictures."""
    stage: StageConfig = field(default_factory=lambda: StageConfig(output="runs/drawing"))
    """The loop."""


def patches(latents: Tensor, side: int) -> Tensor:
    """Cut latents (B, C, H, W) into patches, row by row: (B, H·W/side², C·side²)."""
    cut = latents.unfold(2, side, side).unfold(3, side, side)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def check_room(latent_shape: Sequence[int], side: int, positions: int) -> None:
    """Refuse patches that do not divide the latents or outnumber the tower's positions.

    Raises: UserError: with the numbers, and what would fit.
    """
    _, height, width = latent_shape
    if side < 1 or height % side or width % side:
        raise UserError(f"patch must divide the latents' {height} x {width}; got {side}.")
    count = (height // side) * (width // side)
    if count >= positions - 2:
        raise UserError(
            f"patch={side} makes {count} patches, and the text tower has {positions} positions, "
            f"captions included. Take a larger patch, such as {2 * side}."
        )


class DrawingLesson(nn.Module):
    """The tower with a head that says patches.

    Args:
        tower: the text encoder that learns.
        latent_shape: (C, H, W).
        side: of a patch.
    """

    def __init__(self, tower: TextEncoder, latent_shape: Sequence[int], side: int) -> None:
        super().__init__()
        channels, height, width = latent_shape
        check_room(latent_shape, side, tower.max_length)
        self.side, self.count = side, (height // side) * (width // side)
        self.tower = tower.module
        self.head = nn.Linear(tower.width, channels * side * side)
        self._before, self._tokenizer = [copy.deepcopy(tower.module)], tower.tokenizer

    def forward(self, captions: Sequence[str], latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return (error of the drawing, distance of the end states from before)."""
        ids = self._tokenizer(captions)
        states = self.tower(ids)
        with torch.no_grad():
            before = self._before[0](ids)
        end = (ids == self._tokenizer.end_id).int().argmax(1)
        rows = torch.arange(len(ids))
        drawn = self.head(states[:, -self.count :]).float()
        error = (drawn - patches(latents, self.side)).square().mean()
        moved = (states[rows, end] - before[rows, end]).float().square().mean()
        return error, moved
