"""Heads that go on fetching what they fetch: their queries, keys and values are not trained.

start_unet.py gives some heads a query that is the same everywhere, and keys and values that are
right to a few per cent. Trained with the rest they are lost within some hundred steps: an optimizer
that takes steps of one size in every direction (Muon) moves them as far as weights that have all to
learn, and no loss of theirs says what they should fetch. What is done with it is learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.trainer.reading import told_attentions


@dataclass(frozen=True)
class HeldConfig:
    """Cross-attention heads that are not trained in what they fetch."""

    attentions: tuple[str, ...] = ()
    """Spatial transformers, as mid_block.attentions.0; the norm before is held too."""
    heads: int = 1
    """How many heads of each, from the first."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        return [] if self.heads >= 1 else [f"heads must be at least 1; got {self.heads}."]


def hold(unet: UNet, config: HeldConfig) -> None:
    """Take the gradient from the named heads' queries, keys and values, and from the norm before.

    Weight decay still shrinks them, by the learning rate times its factor in a step. `check_held`
    comes first.
    """
    for told in told_attentions(unet, config.attentions):
        attention: Any = told.attention
        transformer: Any = unet.get_submodule(told.name)
        norm: Any = transformer.transformer_blocks[0].norm2
        rows = attention.to_q.out_features // attention.heads * config.heads
        for parameter in (norm.weight, norm.bias):
            _hold_rows(parameter, len(parameter))
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            _hold_rows(layer.weight, rows)


def _hold_rows(parameter: nn.Parameter, rows: int) -> None:
    def without(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:rows]), gradient[rows:]])

    if parameter.requires_grad:
        parameter.register_hook(without)


def check_held(unet: UNet, config: HeldConfig, divided: bool) -> None:
    """Refuse what cannot be held.

    Args:    divided: whether the launch cuts weights into shards.
    Raises:  UserError: a name that is no spatial transformer, more heads than one has, shards.
    """
    for told in told_attentions(unet, config.attentions, "held.attentions"):
        if told.attention.heads < config.heads:
            raise UserError(
                f"held.heads must be at most the {told.attention.heads} heads of {told.name}; "
                f"got {config.heads}."
            )
    if config.attentions and divided:
        raise UserError(
            "held.attentions holds rows of whole weights, and this launch cuts weights into "
            "shards. Launch with training/accelerate/ddp.yaml or one process, or empty it."
        )
