"""The autoencoder in bands of rows: the same pixels in a fraction of the memory.

GroupNorm takes its mean and variance over the whole image. Tiles that run on their own have others,
and so other colours, which blending their borders only hides. Here every band has the statistics of
the whole: they are gathered over all bands before the norm is applied to any. What was computed for
them is dropped and computed again, which makes a decoder about 1.6 times as slow.

A 3×3 convolution asks for one row on either side; rows that a cut made wrong are left out. Between
blocks a feature map is kept in 16 bits, as integers with one scale for each row and channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.blocks import ResnetBlock
from latentdiff.models.vae import AutoencoderKL

#: Of a band; with Stable Diffusion's 256 channels there, 64 MiB.
PIXELS = 2**16
#: Rows of a result that a cut spoils: at most three convolutions follow each other. Even, so that
#: resolutions can change.
HALO = 4
#: The same through half of AutoencoderTiny, in rows of latents: up to ten convolutions a level.
TINY_HALO = 24
#: Bands have a multiple of these rows, whatever the resolutions between the ends of a network.
_STEP = 32
_LARGEST = 2**15 - 1
_IDENTITY = nn.Identity()

Layer = Callable[[Tensor], Tensor]


def decode(module: AutoencoderKL, latents: Tensor) -> Tensor:
    """As `module.decode`: images (B, 3, H, W) of unscaled latents (B, C, h, w)."""
    decoder: Any = module.decoder
    x = FeatureMap([decoder.mid_block(decoder.conv_in(module.post_quant_conv(latents)))])
    before: tuple[Layer, float] = (_IDENTITY, 1)
    for level in decoder.up_blocks:
        for resnet in level.resnets:
            x, before = _through_resnet(x, resnet, *before), (_IDENTITY, 1)
        for double in getattr(level, "upsamplers", ()):
            before = (double, 2)  # With the block behind it: this result is the largest of all.
    last = _normalised(x, _IDENTITY, 1, decoder.conv_norm_out)
    return x.whole(lambda rows: decoder.conv_out(last(rows)))


def encode(module: AutoencoderKL, images: Tensor) -> Tensor:
    """As `module.encode`: mean and log-variance (B, 2C, h, w) of images (B, 3, H, W)."""
    encoder: Any = module.encoder
    x = FeatureMap(FeatureMap([images]).bands(encoder.conv_in))
    for level in encoder.down_blocks:
        for resnet in level.resnets:
            x = _through_resnet(x, resnet)
        for halve in getattr(level, "downsamplers", ()):
            x = FeatureMap(x.bands(halve, 0.5, release=True))
    h = encoder.mid_block(x.whole())
    return module.quant_conv(encoder.conv_out(F.silu(encoder.conv_norm_out(h))))


def in_bands(network: Layer, x: Tensor, scale: float) -> Tensor:
    """network(x) of a network without norms, AutoencoderTiny's encoder or decoder.

    Args: scale: rows of the result for each of x.
    """
    return FeatureMap([x]).whole(network, scale, halo=round(TINY_HALO * max(scale, 1)))


class FeatureMap:
    """(B, C, H, W) as bands of rows, each of them integers and their scale."""

    def __init__(self, bands: Iterable[Tensor]) -> None:
        """Args: bands: (B, C, rows, W), from the top down."""
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.height = 0
        for band in bands:
            scale = band.abs().amax(3, keepdim=True).float().clamp_min(1e-30) / _LARGEST
            self.kept[self.height] = (band / scale).round().to(torch.int16), scale
            self.height += band.shape[2]
            self.width, self.dtype = band.shape[3], band.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """(B, C, stop − start, W)."""
        parts = []
        for first, (integers, scale) in self.kept.items():
            own = slice(max(start - first, 0), max(stop - first, 0))
            parts.append((integers[:, :, own] * scale[:, :, own]).to(self.dtype))
        return torch.cat(parts, 2)

    def bands(
        self, layer: Layer, scale: float = 1, *, halo: int = HALO, release: bool = False
    ) -> Iterator[Tensor]:
        """The bands of layer(x).

        Args:    scale: its rows for each of x.  halo: those of them that a cut spoils.
                 release: free what is not needed any more; x is used up.
        """
        height = round(self.height * scale)
        step = max(round(PIXELS / (self.width * scale) / _STEP), 1) * _STEP
        for start in range(0, height, step):
            stop = min(start + step, height)
            low, high = max(start - halo, 0), min(stop + halo, height)
            result = layer(self.rows(round(low / scale), round(high / scale)))
            yield result[:, :, start - low : stop - low]
            for first, (integers, _) in list(self.kept.items()) if release else ():
                if first + integers.shape[2] <= round((stop - halo) / scale):
                    del self.kept[first]

    def whole(self, layer: Layer = _IDENTITY, scale: float = 1, **options: Any) -> Tensor:
        """All of layer(x); arguments: `bands`."""
        return torch.cat(list(self.bands(layer, scale, **options)), 2)


def _through_resnet(
    x: FeatureMap, block: ResnetBlock, before: Layer = _IDENTITY, scale: float = 1
) -> FeatureMap:
    """block(before(x)), where `before` makes scale rows of one; x is used up."""
    first = _normalised(x, before, scale, block.norm1)
    second = _normalised(x, lambda rows: block.conv1(first(before(rows))), scale, block.norm2)

    def whole(rows: Tensor) -> Tensor:
        given = before(rows)
        h = block.conv2(second(block.conv1(first(given))))
        return h + (given if block.conv_shortcut is None else block.conv_shortcut(given))

    return FeatureMap(x.bands(whole, scale, release=True))


def _normalised(x: FeatureMap, before: Layer, scale: float, norm: nn.GroupNorm) -> Layer:
    """silu(norm(·)) for any part of before(x), with the statistics of the whole."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for band in x.bands(before, scale):
        groups = band.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        variance, mean = (s.double().cpu() for s in torch.var_mean(groups, 2, correction=0))
        count, total = count + groups.shape[2], total + groups.shape[2] * mean
        squares = squares + groups.shape[2] * (variance + mean**2)
    mean = total / count
    factor = (squares / count - mean**2 + norm.eps).rsqrt()

    def per_channel(values: Tensor) -> Tensor:
        each = norm.num_channels // norm.num_groups
        return values.repeat_interleave(each, 1)[:, :, None, None].to(norm.weight)

    shape = (1, -1, 1, 1)
    slope = per_channel(factor) * norm.weight.view(shape)
    offset = norm.bias.view(shape) - per_channel(mean) * slope
    return lambda rows: F.silu(torch.addcmul(offset, rows, slope), inplace=True)
