"""ResNet blocks and changes of resolution, shared with the autoencoder, and the U-Net's levels.

In a level each ResNet block is followed by a transformer where there is attention. Down blocks hand
every intermediate result to the up block of the same resolution, which concatenates it to its own
input (Ronneberger et al. 2015, arXiv:1505.04597).
Attribute names are those of diffusers, since they are the keys of the weight files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.attention import Context, SpatialTransformer

MakeTransformer = Callable[[int], SpatialTransformer]
"""Builds a transformer for a number of channels."""


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a residual; the time embedding enters between them."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        groups: int,
        eps: float,
        time_width: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build the layers.

        Args:    time_width: channels of the time embedding; None: there is none.
                 scale_shift: let it scale and shift what the second norm gives, h (1 + s) + b
                 (Dhariwal & Nichol 2021, section 4.3, arXiv:2105.05233), not add it before.
        """
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1)
        self.scale_shift = scale_shift
        wanted = 2 * c_out if scale_shift else c_out
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, wanted)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, kernel_size=1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """Map (B, c_in, H, W) to (B, c_out, H, W); emb (B, time_width) is activated already."""
        h = self.conv1(F.silu(self.norm1(x)))
        time = None if self.time_emb_proj is None else self.time_emb_proj(emb)[:, :, None, None]
        if time is not None and not self.scale_shift:
            h = h + time
        h = self.norm2(h)
        if time is not None and self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        """Args: padding: 1: on every side; 0: on the right and below only, as the autoencoder."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, ⌈H/2⌉, ⌈W/2⌉), without padding rounded down."""
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeat pixels up to a size, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C, *size), twice H and W but for rounding; None: exactly."""
        height, width = (2 * side for side in x.shape[-2:]) if size is None else size
        return self.conv(F.interpolate(x, size=[height, width], mode="nearest"))


class Block(nn.Module):
    """What down, middle and up blocks share: their layers, and recomputing them if asked."""

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        make_resnet: Callable[[int, int], ResnetBlock],
        make_transformer: MakeTransformer | None,
        transformers: int | None = None,
    ) -> None:
        """Build the layers.

        Args:    channels: (in, out) of each ResNet block.
                 make_transformer: None for a block without attention.
                 transformers: how many; None for one behind every ResNet block.
        """
        super().__init__()
        self.checkpointing = False
        """Recompute activations in the backward pass instead of keeping them."""
        self.resnets = nn.ModuleList(make_resnet(*pair) for pair in channels)
        self.attentions = nn.ModuleList()
        if make_transformer is not None:
            wanted = channels if transformers is None else channels[:transformers]
            self.attentions.extend(make_transformer(c_out) for _, c_out in wanted)

    def run(self, layer: nn.Module, *args: Any) -> Tensor:
        """Call a layer, under gradient checkpointing when it is on and gradients are wanted."""
        if self.checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)


class DownBlock(Block):
    """ResNet blocks (and transformers), then a halving of the resolution unless it is the last."""

    def __init__(self, *args: Any, downsample: int | None) -> None:
        """Args: *args as Block; downsample: channels of the halving, None without."""
        super().__init__(*args)
        self.downsamplers = nn.ModuleList([Downsample(downsample)] if downsample else [])

    def forward(self, x: Tensor, emb: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """Return the block's output and all results that the up path will want."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, emb)
            if len(self.attentions):
                x = self.run(self.attentions[i], x, context)
            skips.append(x)
        for halve in self.downsamplers:
            x = halve(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """ResNet, transformer, ResNet at the lowest resolution (a single ResNet without attention)."""

    def forward(self, x: Tensor, emb: Tensor, context: Context) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        x = self.run(self.resnets[0], x, emb)
        for transformer, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = self.run(transformer, x, context)
            x = self.run(resnet, x, emb)
        return x


class UpBlock(Block):
    """ResNet blocks (and transformers) over input and skips, then a doubling of the resolution."""

    def __init__(self, *args: Any, upsample: int | None) -> None:
        """Args: *args as Block; upsample: channels of the doubling, None without."""
        super().__init__(*args)
        self.upsamplers = nn.ModuleList([Upsample(upsample)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor, context: Context) -> Tensor:
        """Consume the last len(resnets) skips; then grow to the size of the skip below them."""
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, torch.cat([x, skips.pop()], dim=1), emb)
            if len(self.attentions):
                x = self.run(self.attentions[i], x, context)
        for double in self.upsamplers:
            x = double(x, skips[-1].shape[-2:])
        return x
