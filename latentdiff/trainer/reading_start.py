"""The start of a U-Net that reads a drawn picture: what it fetches is right, where is still learnt.

For the attentions of `reading` and a text tower that draws, before any step:

- keys: the position of patch (r, c) becomes one-hot(r) ⊕ one-hot(c), the begin mark an axis of its
  own, words the opposite of it; so a query has to name a row and a column, or ask for nothing;
- values: a head's part of the patch, and nothing at the begin mark;
- where a part is one place of the latents, its values go to channels of the residual stream that
  the layers behind hand on, spread over the groups, since a GroupNorm takes the size from a group
  that holds nothing else.

Keys and values are ridge regressions on the tower's own states, so any code of theirs will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.trainer.reading import (
    ReadingConfig,
    Told,
    check_grid,
    latent_side,
    told_attentions,
)
from latentdiff.trainer.unfolding import linear_map

#: Length of the keys: for a query of ordinary length the softmax is sharp.
KEY = 6.0
#: How much of a coarser part enters the residual stream at first.
ENTERS = 0.25


@torch.no_grad()
def start_reading(unet: UNet, config: ReadingConfig, states: Tensor, wanted: Tensor) -> float:
    """Write keys, values and outputs of the attentions that `config` names.

    Args:    states: of some captions, (N, tokens, width); N in the hundreds.
             wanted: what they draw, (N, grid², values of a patch), as `drawing.patches` cuts it.
    Returns: the mean squared error of what heads fetch at the right place.
    Raises:  UserError: heads too few or too narrow for a patch.
    """
    count, size = config.grid**2, wanted.shape[2]
    whole = latent_side(unet.config)
    said, begin = states[:, -count:].flatten(0, 1), states[:, 0]
    nothing = wanted.new_zeros(len(begin), size)
    values = linear_map(torch.cat([said, begin]), torch.cat([wanted.flatten(0, 1), nothing]))
    keys = _keys(states, config.grid)
    for told in told_attentions(unet, config.attentions):
        check_grid(told, unet.config, config.grid)
        side = told.side(unet.config)
        order = part_values(size, whole // config.grid, side // config.grid)
        _write_heads(told, keys, values, order)
        transformer: Any = unet.get_submodule(told.name)
        if side == whole:
            _write_places(unet, told, transformer, order.shape[1])
        else:
            _enter(transformer)
    return float((said @ values.T - wanted.flatten(0, 1)).square().mean())


def part_values(size: int, patch: int, parts: int) -> Tensor:
    """Which values of a patch (C, patch, patch), flattened, belong to each of parts×parts parts.

    Returns: (parts², size / parts²) indices.
    """
    step = patch // parts
    numbers = torch.arange(size).view(-1, parts, step, parts, step)
    return numbers.permute(1, 3, 0, 2, 4).reshape(parts**2, -1)


def _keys(states: Tensor, grid: int) -> Tensor:
    """Map of states to the axes row, column and begin, (2 grid + 1, width)."""
    count, few = grid**2, states[:, 1 : -(grid**2) : 7]
    row, column = torch.arange(count) // grid, torch.arange(count) % grid
    patch = torch.cat([torch.eye(grid)[row], torch.eye(grid)[column], torch.zeros(count, 1)], 1)
    begin = torch.eye(2 * grid + 1)[-1:]
    axes = torch.cat([patch, begin, -begin.expand(few.shape[1], -1)]).repeat(len(states), 1)
    inputs = torch.cat([states[:, -count:], states[:, :1], few], 1).flatten(0, 1)
    return linear_map(inputs, axes)


def _write_heads(told: Told, keys: Tensor, values: Tensor, order: Tensor) -> None:
    """Keys for every head, and to each the values that it fetches."""
    attention, size = told.attention, order.shape[1]
    width = attention.to_q.out_features // attention.heads
    sharing = told.heads // len(order)  # heads that read the same part
    each = -(-size // sharing)
    if width < max(each, len(keys)):
        raise UserError(
            f"heads of {told.name} must have at least {max(each, len(keys))} channels, for {each} "
            f"values and {len(keys)} axes; they have {width}. Give that level more "
            "block_out_channels or fewer heads in attention_head_dim."
        )
    attention.to_v.weight.zero_()
    for h in range(attention.heads):
        number, first = told.first_head + h, h * width
        mine = number // len(order) * each
        share = order[number % len(order)][mine : mine + each]
        attention.to_v.weight[first : first + len(share)] = values[share]
        attention.to_k.weight[first : first + len(keys)] = KEY * keys


def _write_places(unet: UNet, told: Told, transformer: Any, size: int) -> None:
    """All heads add what they fetched to the same channels, which the block hands on."""
    attention, groups = told.attention, unet.config.norm_num_groups
    channels, width = attention.to_q.out_features, attention.to_q.out_features // attention.heads
    slots = [(k % groups) * (channels // groups) + k // groups for k in range(size)]
    out: Any = attention.to_out[0]
    out.weight.zero_()
    out.bias.zero_()
    block = transformer.transformer_blocks[0]
    for other in (block.attn1.to_out[0], block.ff.net[2]):
        other.weight[slots] = 0
        other.bias[slots] = 0
    for k, slot in enumerate(slots):
        out.weight[slot, k::width] = 1
        transformer.proj_in.weight[slot] = 0
        transformer.proj_in.bias[slot] = 0
        transformer.proj_out.weight[slot, slot] = 1
    for number, resnet in enumerate(unet.get_submodule(f"{told.block}.resnets").children()):
        shortcut: Any = resnet.conv_shortcut
        if number > int(told.name.rpartition(".")[2]) and shortcut is not None:
            shortcut.weight[slots] = 0
            shortcut.bias[slots] = 0
            shortcut.weight[slots, slots] = 1


def _enter(transformer: Any) -> None:
    """Add a share of what heads fetched to the residual stream, as it lies."""
    out = transformer.transformer_blocks[0].attn2.to_out[0]
    for layer in (out, transformer.proj_out):
        layer.weight.copy_(torch.eye(len(layer.weight)).view_as(layer.weight) * ENTERS**0.5)
