"""Where cross-attention should look, as a loss: for contexts whose last tokens are a picture.

A tower taught by teach_drawing.py says a patch of the picture in each of its last grid² positions.
Reading them is copying, but a U-Net knows places from its zero padding only, and finds out slowly
that a place wants its own patch. So the attention is told, by the cross-entropy of its map:

    −log A[head h, place p, token j],   j = the patch around p  if h reads the part of it at p,
                                            the begin mark      otherwise

A patch that covers s×s places has s² parts; head h of the named attentions, numbered through, reads
part h mod s². What a head fetches (its share of to_v) is left to the picture's own loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.models.attention import Attention
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig


@dataclass(frozen=True)
class ReadingConfig:
    """The loss that shows cross-attention a picture's patches among the text's last positions."""

    weight: float = 0.0
    """Its weight beside the denoising loss; 0 is off. `loss` in the log is the sum of both."""
    grid: int = 4
    """Patches per side: the last grid² tokens of the context are the picture's, row by row."""
    attentions: tuple[str, ...] = ()
    """The spatial transformers that are told, as up_blocks.2.attentions.0; at one resolution their
    heads share the parts of a patch."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = []
        if not 0 <= self.weight < math.inf:
            problems.append(f"weight must be at least 0; got {self.weight}.")
        if self.grid < 1:
            problems.append(f"grid must be at least 1; got {self.grid}.")
        if self.weight and not self.attentions:
            problems.append("attentions must name at least one when weight is above 0; got none.")
        if len(set(self.attentions)) < len(self.attentions):
            problems.append(f"attentions must differ; got {', '.join(self.attentions)}.")
        return problems


def part_numbers(side: int, grid: int) -> tuple[Tensor, Tensor]:
    """Of each place of a side×side map: its patch, and which part of the patch it is; (side²,)."""
    step = side // grid
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patch = (row // step) * grid + column // step
    part = (row % step) * step + column % step
    return patch.flatten(), part.flatten()


def targets(
    side: int, tokens: int, grid: int, first_head: int, heads: int
) -> tuple[Tensor, Tensor]:
    """The token that each head should look at from each place, and its weight, (heads, side²).

    Places of a head's own part count half, and all others together half.
    """
    patch, part = part_numbers(side, grid)
    reads = torch.arange(first_head, first_head + heads) % (side // grid) ** 2
    own = part[None] == reads[:, None]
    wanted = torch.where(own, tokens - grid**2 + patch, 0)
    kinds = [kind / kind.sum() for kind in (own, ~own) if bool(kind.any())]
    return wanted, torch.stack(kinds).mean(0)


def map_loss(
    attention: Attention, x: Tensor, key: Tensor, wanted: Tensor, counts: Tensor
) -> Tensor:
    """Mean cross-entropy of an attention's map to where it should look.

    Args: x: what it is given, (B, N, width).  key: (B, heads, tokens, head_dim).
          wanted, counts: as `targets` gives them, (heads, N).
    """
    heads, width = key.shape[1], key.shape[3]
    query = attention.to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = ((query / math.sqrt(width)) @ key.mT).float()
    found = scores.gather(3, wanted[None, ..., None].expand(len(x), -1, -1, 1))[..., 0]
    return ((scores.logsumexp(3) - found).mean(0) * counts).sum()


@dataclass(frozen=True)
class Told:
    """A cross-attention that is told where to look."""

    name: str
    """Of its spatial transformer."""
    attention: Attention
    """The attention."""
    first_head: int
    """Number of its first head among those of the block."""
    heads: int
    """Heads of the block's told attentions together."""

    @property
    def block(self) -> str:
        """Name of the U-Net's block that it stands in."""
        return self.name.partition(".attentions")[0]

    def side(self, config: UNetConfig) -> int:
        """Places per side of its map, for pictures of the size that the U-Net is made for."""
        kind, _, number = self.block.partition(".")
        last = len(config.block_out_channels) - 1
        level = {"up_blocks": last - int(number or 0), "down_blocks": int(number or 0)}
        return latent_side(config) // 2 ** level.get(kind, last)


def latent_side(config: UNetConfig) -> int:
    """Side of the latents that the U-Net is made for. Raises: UserError: not one number."""
    if not isinstance(config.sample_size, int):
        raise UserError(f"reading needs square latents of one size; the U-Net's sample_size is "
                        f"{config.sample_size}.")  # fmt: skip
    return config.sample_size


def told_attentions(
    unet: UNet, names: Sequence[str], key: str = "reading.attentions"
) -> list[Told]:
    """The attentions of the named transformers. Raises: UserError: a name that is none."""
    found: list[tuple[str, Attention]] = []
    for name in names:
        try:
            attention = unet.get_submodule(f"{name}.transformer_blocks.0.attn2")
        except AttributeError:
            have = [n for n, _ in unet.named_modules() if n.endswith("transformer_blocks.0.attn2")]
            known = ", ".join(n.partition(".transformer_blocks")[0] for n in have) or "none"
            raise UserError(
                f"{key}: {name} is no spatial transformer of this U-Net. It has {known}."
            ) from None
        assert isinstance(attention, Attention)
        found.append((name, attention))
    told: list[Told] = []
    for name, attention in found:
        block = name.partition(".attentions")[0]
        heads = sum(a.heads for n, a in found if n.partition(".attentions")[0] == block)
        before = sum(t.attention.heads for t in told if t.block == block)
        told.append(Told(name, attention, before, heads))
    return told


class Reading:
    """Collects the loss while the U-Net runs in training; `check_reading` comes first."""

    def __init__(self, unet: UNet, config: ReadingConfig) -> None:
        self.config = config
        self._terms: list[Tensor] = []
        for told in told_attentions(unet, config.attentions) if config.weight else []:
            told.attention.register_forward_pre_hook(self._hook(told, told.side(unet.config)))

    def loss(self) -> Tensor | float:
        """The weighted loss of the forward passes since the last call; 0 where none was seen."""
        terms, self._terms = self._terms, []
        return self.config.weight * torch.stack(terms).mean() if terms else 0.0

    def _hook(self, told: Told, side: int) -> Any:
        ready: dict[int, tuple[Tensor, Tensor]] = {}

        def see(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not (attention.training and torch.is_grad_enabled()):
                return
            assert isinstance(attention, Attention)
            x, (key, _) = inputs
            tokens = key.shape[2]
            if tokens not in ready:
                made = targets(side, tokens, self.config.grid, told.first_head, attention.heads)
                ready[tokens] = (made[0].to(x.device), made[1].to(x.device))
            self._terms.append(map_loss(attention, x, key, *ready[tokens]))

        return see


def check_shape(unet: UNet, config: ReadingConfig, shape: Sequence[int]) -> None:
    """Refuse latents (C, H, W) of another size than the U-Net's own. Raises: UserError."""
    side = latent_side(unet.config) if config.weight else 0
    if side and tuple(shape[-2:]) != (side, side):
        raise UserError(
            f"reading needs latents of {side} x {side}, the U-Net's sample_size; the data's are "
            f"{shape[-2]} x {shape[-1]}. Set reading.weight=0, or take data of that size."
        )


def check_reading(unet: UNet, config: ReadingConfig, tokens: int) -> None:
    """Refuse what cannot be read; weight 0 is always fine.

    Args:    tokens: length of the contexts.
    Raises:  UserError: a name that is no spatial transformer, patches that do not divide a map,
             heads that cannot share them, contexts shorter than the patches.
    """
    if not config.weight:
        return
    if tokens <= config.grid**2:
        raise UserError(
            f"reading.grid={config.grid} wants {config.grid**2} patches behind the words; the text "
            f"encoder has {tokens} positions. Lower it, or set reading.weight=0."
        )
    for told in told_attentions(unet, config.attentions):
        check_grid(told, unet.config, config.grid)


def check_grid(told: Told, config: UNetConfig, grid: int) -> None:
    """Refuse a grid that does not divide the map, or more parts than heads. Raises: UserError."""
    side = told.side(config)
    if side % grid:
        raise UserError(
            f"reading.grid must divide the {side} places per side of {told.name}; got {grid}."
        )
    parts = (side // grid) ** 2
    if told.heads % parts or (side == latent_side(config) and told.heads != parts):
        raise UserError(
            f"the heads of {told.block} that are told must share the {parts} parts of a patch "
            f"evenly, at the finest level one each; they are {told.heads}. Name more or fewer of "
            "its attentions in reading.attentions, or change attention_head_dim."
        )
