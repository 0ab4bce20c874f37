"""Teaching a text tower what things look like, so that a U-Net has to learn less.

A new tower is taught in two lessons, for a subject picture y (latents of the thing itself, without
style and ground, and where it is opaque):

    whole:     |head(end state) − y|²              short rows, all layers but the last
    patches:   mean_j |head(state_j) − y_j|²       the last positions each say one patch of y

The first puts the picture into one vector; the second lets the U-Net's cross-attention find the
piece that a place needs. The last layer starts as the exact linear map from the vector to the
patches (see `unfolding`), so the second lesson only polishes. Otherwise a U-Net learns what 1,600
things look like through its cross-attention and at all noise levels at once, which takes it many
times longer than a regression without noise does.

With clip_weight both lessons also keep what a CLIP score needs: a projection of the end state stays
where the features of the tower before were. The heads are needed for training only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.data.source import DataConfig
from latentdiff.errors import UserError
from latentdiff.models.clip_text import ClipText
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.trainer.stage import StageConfig


@dataclass(frozen=True)
class TowerConfig:
    """Shape of the new text tower."""

    width: int = 448
    """Width of the states; the U-Net's cross_attention_dim."""
    layers: int = 3
    """Layers, the one that unfolds the picture included."""
    hidden: int = 2320
    """Width inside the MLPs; the last one holds (1 + values of a patch) for each patch."""
    heads: int = 7
    """Attention heads."""
    max_tokens: int = 40
    """Positions: the longest caption, marks included, and one for each patch."""


@dataclass(frozen=True)
class DrawingConfig:
    """Everything that teach_drawing.py needs."""

    model: str = "embedded"
    """Model folder, or `embedded`: its autoencoder, vocabulary and old text tower are used."""
    start: str | None = None
    """Output folder of the first lesson, which the second goes on from, or of a second one (or
    `embedded`), to go further; null is the first."""
    tower: TowerConfig = field(default_factory=TowerConfig)
    """The new tower."""
    patch: int = 4
    """Side of a patch in latent positions."""
    clip_weight: float = 0.1
    """Weight of the cosine distance to the old tower's features; 0 does without the CLIP."""
    momentum: float = 0.95
    """Of the optimizer, Muon."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captioned pictures."""
    stage: StageConfig = field(default_factory=lambda: StageConfig(output="runs/drawing"))
    """The loop."""


def patches(pictures: Tensor, side: int) -> Tensor:
    """Cut pictures (B, C, H, W) into patches, row by row: (B, H·W/side², C·side²)."""
    cut = pictures.unfold(2, side, side).unfold(3, side, side)
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def check_room(shape: tuple[int, int, int], side: int, tower: TowerConfig) -> None:
    """Refuse patches that do not divide the picture, or do not fit the tower.

    Raises: UserError: with the numbers, and what would fit.
    """
    channels, height, width = shape
    if side < 1 or height % side or width % side:
        raise UserError(f"patch must divide the latents' {height} x {width}; got {side}.")
    count = (height // side) * (width // side)
    if count + 8 > tower.max_tokens:
        raise UserError(
            f"patch={side} makes {count} patches, and the text tower has {tower.max_tokens} "
            f"positions, captions included. Take patch={2 * side}, or raise tower.max_tokens."
        )
    needed = count * (channels * side * side + 1)
    if tower.hidden < needed:
        raise UserError(f"tower.hidden must be at least {needed} for these patches; got "
                        f"{tower.hidden}.")  # fmt: skip


def check_same_tower(
    found: TextEncoder, shape: TowerConfig, tokenizer: ClipTokenizer, where: Path
) -> None:
    """Refuse to go on with a tower of another shape or vocabulary. Raises: UserError."""
    config = found.module.config
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "hidden": "intermediate_size",
        "heads": "num_attention_heads",
        "max_tokens": "max_position_embeddings",
    }
    wrong = [
        f"tower.{ours}={config[theirs]} (not {getattr(shape, ours)})"
        for ours, theirs in names.items()
        if config[theirs] != getattr(shape, ours)
    ]
    if wrong:
        raise UserError(f"start={where} is another tower than the configuration's. Set "
                        f"{', '.join(wrong)}.")  # fmt: skip
    if found.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise UserError(
            f"start={where} has another vocabulary than `model`, whose captions are read. Name the "
            "model that the tower belongs to."
        )


def new_tower(shape: TowerConfig, layers: int, before: ClipText, patch_count: int) -> ClipText:
    """Make a tower of `layers` layers with random weights and the vocabulary of another one."""
    tower = ClipText(
        {
            **before.config,
            "hidden_size": shape.width,
            "intermediate_size": shape.hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": shape.heads,
            "max_position_embeddings": shape.max_tokens,
        }
    )
    words, places = tower.embeddings.token_embedding, tower.embeddings.position_embedding
    nn.init.normal_(words.weight, std=0.5)
    nn.init.normal_(places.weight, std=0.2)
    # The last layer has to tell the patches' positions apart whatever the caption says.
    nn.init.normal_(places.weight[-patch_count:], std=1.0)
    return tower


def end_places(token_ids: Tensor, end_id: int) -> Tensor:
    """Position of the first end mark of each row, (B,)."""
    return (token_ids == end_id).int().argmax(1)


def short_rows(
    token_ids: Tensor, end_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out most of the padding: what is behind the longest text, but for one end mark.

    That one stands at a random place behind the text, so that any place learns to read it.

    Args:    token_ids: (B, T).
    Returns: ids (B, t), positions (B, t), the place of each row's first end mark (B,).
    """
    ends = end_places(token_ids, end_id)
    length, (count, room) = int(ends.max()) + 1, token_ids.shape
    ids = F.pad(token_ids[:, :length], (0, 1), value=end_id)
    positions = torch.arange(length + 1).expand(count, -1).clone()
    chance = torch.rand(count, generator=generator)
    positions[:, -1] = (length + (chance * (room - length)).long()).clamp(max=room - 1)
    return ids, positions, ends


def rows_with_patches(token_ids: Tensor, end_id: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out the padding between the longest text and the last `count` positions.

    Args:    token_ids: (B, T).
    Returns: as `short_rows`.
    """
    ends = end_places(token_ids, end_id)
    length, places = int(ends.max()) + 2, torch.arange(token_ids.shape[1])
    kept = (places < length) | (places >= len(places) - count)
    return token_ids[:, kept], places[kept].expand(len(token_ids), -1), ends


class Lesson(nn.Module):
    """What both lessons share: the tower, its head, and the projection of the end state.

    Args:
        tower: what is taught.
        values: how many numbers the head says.
        projection: dimensions of the CLIP's shared space.
    """

    def __init__(self, tower: ClipText, values: int, projection: int) -> None:
        super().__init__()
        width = tower.config["hidden_size"]
        self.tower, self.head = tower, nn.Linear(width, values)
        self.projection = nn.Linear(width, projection, bias=False)

    def clip_distance(self, end_states: Tensor, wanted: Tensor) -> Tensor:
        """Mean cosine distance of the projected end states to the first rows' old features."""
        if not len(wanted):
            return end_states.new_zeros(())
        said = self.projection(end_states[: len(wanted)])
        return 1 - F.cosine_similarity(said, wanted, dim=1).mean()


class WholeLesson(Lesson):
    """First lesson: end marks say the whole subject picture."""

    def forward(self, rows: Any, picture: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (error of the picture, distance to the old CLIP features).

        Args: rows: what `short_rows` gives.  picture: (B, C, H, W).  features: (≤ B, D) unit.
        """
        ids, positions, ends = rows
        states = self.tower(ids, positions)
        end_states = states[torch.arange(len(ids), device=ends.device), ends]
        said = self.head(torch.stack([end_states, states[:, -1]])).float()
        error = (said - picture.flatten(1)).square().mean()
        return error, self.clip_distance(end_states, features)


class PatchLesson(Lesson):
    """Second lesson: the last positions say a patch each."""

    def __init__(self, tower: ClipText, values: int, projection: int, side: int) -> None:
        """Args: as Lesson; side: of a patch."""
        super().__init__(tower, values, projection)
        self.side = side

    def forward(self, rows: Any, picture: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (error of the patches, distance to the old CLIP features).

        Args: rows: what `rows_with_patches` gives; the others as in WholeLesson.
        """
        ids, positions, ends = rows
        wanted = patches(picture, self.side)
        states = self.tower(ids, positions)
        said = self.head(states[:, -wanted.shape[1] :]).float()
        end_states = states[torch.arange(len(ids), device=ends.device), ends]
        return (said - wanted).square().mean(), self.clip_distance(end_states, features)
