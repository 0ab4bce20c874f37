"""The denoising U-Net: (x_t, timestep, context) → prediction.

ResNet blocks and transformers on a way down to coarse features and back up, with skips between
equal resolutions (Rombach et al. 2022, arXiv:2112.10752; Ho et al. 2020, appendix B).
`state_dict()` has exactly the keys and shapes of diffusers' UNet2DConditionModel of the same
configuration, so its checkpoints, LoRA files and tools fit with no conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.models.attention import (
    Attention,
    Context,
    ContextKV,
    SpatialTransformer,
    attention_backend,
)
from latentdiff.models.blocks import Block, DownBlock, MidBlock, ResnetBlock, UpBlock
from latentdiff.models.text_embedding import TextTimeEmbedding
from latentdiff.models.time_embedding import (
    FourierFeatures,
    SinusoidalFeatures,
    TimestepEmbedding,
)
from latentdiff.models.unet_config import (
    UNetConfig,
    config_from_dict,
    config_to_dict,
    per_level,
)


def with_extra(unet: Callable[..., Tensor], extra: Tensor | None) -> Callable[..., Tensor]:
    """A U-Net that is given `extra` (B, E, H, W) in channels after those of x_t; None: nothing.

    x_t may be several such batches, one after another, as guidance has it.
    """
    if extra is None:
        return unet

    def predict(x_t: Tensor, *others: Any, **named: Any) -> Tensor:
        own = extra.to(x_t.dtype).repeat(len(x_t) // len(extra), 1, 1, 1)
        return unet(torch.cat([x_t, own], dim=1), *others, **named)

    return predict


class UNet(nn.Module):
    """A U-Net conditioned on timestep and context; weights as diffusers' UNet2DConditionModel."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, first, kernel_size=3, padding=1)
        self.time_proj, features, self.time_width = _time_features(config)
        self.time_embedding = TimestepEmbedding(features, self.time_width)
        self.add_embedding = (
            TextTimeEmbedding(
                config.cross_attention_dim, self.time_width, config.addition_embed_type_num_heads
            )
            if config.addition_embed_type
            else None
        )
        self.down_blocks = nn.ModuleList(_down_blocks(config, self.time_width))
        self.mid_block = _mid_block(config, self.time_width)
        self.up_blocks = nn.ModuleList(_up_blocks(config, self.time_width))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, kernel_size=3, padding=1)
        self._cross_attentions = _index_cross_attentions(self)

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> UNet:
        """Build from a parsed diffusers config.json.

        Raises: UserError: naming each field that is unknown or has an unsupported value.
        """
        return cls(config_from_dict(data))

    def config_dict(self) -> dict[str, Any]:
        """The configuration as diffusers' config.json, with every field of its class."""
        return config_to_dict(self.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.conv_in.weight.dtype

    def project_context(self, context: Tensor) -> ContextKV:
        """All that is computed of the context alone, for reuse over the steps of a generation.

        Args:    context: (B, tokens, cross_attention_dim).
        Returns: what `forward` takes as kv.
        Raises:  UserError: context of another width.
        """
        context = self._checked(context)
        pairs = tuple(attention.project(context) for attention in self._cross_attentions)
        return ContextKV(pairs, self._pooled(context))

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        context: Tensor | None = None,
        *,
        kv: ContextKV | None = None,
    ) -> Tensor:
        """Predict eps, x0, v or flow, whichever the model was trained for.

        Args:    x_t: noisy latents (B, in_channels, H, W).
                 timestep: index 0 … T−1 (T for flow), a number or (B,); fractions allowed.
                 context: text states (B, tokens, cross_attention_dim).
                 kv: `project_context` of such a context, instead of it.
        Returns: (B, out_channels, H, W).
        Raises:  UserError: context and kv both missing, or for another batch size.
        """
        text: Context
        if kv is None:
            text = self._checked(context)
            pooled = self._pooled(text)
        else:
            text, pooled = kv
        _check_batch(x_t, text, pooled)
        t = torch.as_tensor(timestep, device=x_t.device).expand(len(x_t))
        # Every ResNet block wants the activated embedding, so it is activated once.
        emb = self.time_embedding(self.time_proj(t).to(self.dtype))
        emb = F.silu(emb if pooled is None else emb + pooled)
        x = self.conv_in(x_t)
        skips = [x]
        for down in self.down_blocks:
            x, new = down(x, emb, text)
            skips += new
        if self.mid_block is not None:
            x = self.mid_block(x, emb, text)
        for up in self.up_blocks:
            x = up(x, skips, emb, text)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def set_attention(self, kind: str) -> None:
        """Choose the attention kernels: sdpa (default) or xformers.

        Raises: UserError: unknown kind, or xformers does not work here, with what is missing.
        """
        attend = attention_backend(kind, self.device, self.dtype)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only block inputs for the backward pass and recompute the rest: less memory."""
        for module in self.modules():
            if isinstance(module, Block):
                module.checkpointing = enabled

    def init_for_training(self) -> UNet:
        """Set the last layer of every residual branch, and of the network, to zero.

        Training from scratch then starts from the identity plus a zero prediction, which is
        steadier than PyTorch's default (Dhariwal & Nichol 2021, arXiv:2105.05233, their code).
        Returns: the U-Net itself.
        """
        ends: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                ends.append(module.conv2)
            elif isinstance(module, SpatialTransformer):
                ends.append(module.proj_out)
        for layer in ends:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
        return self

    def _checked(self, context: Tensor | None) -> Tensor:
        if context is None:
            raise UserError("the U-Net needs context, or kv = unet.project_context(context).")
        width = self.config.cross_attention_dim
        if context.ndim != 3 or context.shape[-1] != width:
            raise UserError(
                f"context must be (batch, tokens, {width}) for this U-Net's cross_attention_dim; "
                f"got {tuple(context.shape)}."
            )
        return context.to(self.dtype)

    def _pooled(self, context: Tensor) -> Tensor | None:
        return None if self.add_embedding is None else self.add_embedding(context)


def _check_batch(x_t: Tensor, text: Context, pooled: Tensor | None) -> None:
    parts = [text] if isinstance(text, Tensor) else [key for key, _ in text]
    if pooled is not None:
        parts.append(pooled)
    for part in parts:
        if len(part) != len(x_t):
            raise UserError(
                f"x_t and context must have the same batch size; got {len(x_t)} and {len(part)}."
            )


def _time_features(config: UNetConfig) -> tuple[nn.Module, int, int]:
    """The feature module, its number of features and the width of the time embedding."""
    channels = config.block_out_channels[0]
    if config.time_embedding_type == "fourier":
        width = config.time_embedding_dim or 2 * channels
        return FourierFeatures(width, config.flip_sin_to_cos), width, width
    width = config.time_embedding_dim or 4 * channels
    features = SinusoidalFeatures(channels, config.flip_sin_to_cos, config.freq_shift)
    return features, channels, width


def _resnets(config: UNetConfig, time_width: int) -> Callable[[int, int], ResnetBlock]:
    return partial(
        ResnetBlock,
        time_width=time_width,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        dropout=config.dropout,
    )


def _transformers(config: UNetConfig, level: int) -> Callable[[int], SpatialTransformer]:
    levels = len(config.block_out_channels)
    return partial(
        SpatialTransformer,
        heads=config.heads[level],
        context_width=config.cross_attention_dim,
        layers=per_level(config.transformer_layers_per_block, levels)[level],
        groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        upcast=config.upcast_attention,
    )


def _down_blocks(config: UNetConfig, time_width: int) -> list[DownBlock]:
    """Blocks from the finest to the coarsest resolution."""
    channels, levels = config.block_out_channels, len(config.block_out_channels)
    blocks = []
    for i, kind in enumerate(config.down_block_types):
        layers = per_level(config.layers_per_block, levels)[i]
        pairs = [(channels[max(i - 1, 0)], channels[i])] + [(channels[i],) * 2] * (layers - 1)
        transformer = _transformers(config, i) if kind.startswith("CrossAttn") else None
        halve = channels[i] if i < levels - 1 else None
        blocks.append(DownBlock(pairs, _resnets(config, time_width), transformer, downsample=halve))
    return blocks


def _mid_block(config: UNetConfig, time_width: int) -> MidBlock | None:
    if config.mid_block_type is None:
        return None
    pair = (config.block_out_channels[-1],) * 2
    make = _resnets(config, time_width)
    if config.mid_block_type == "UNetMidBlock2D":
        return MidBlock([pair], make, None)
    return MidBlock([pair, pair], make, _transformers(config, -1), 1)


def _up_blocks(config: UNetConfig, time_width: int) -> list[UpBlock]:
    """Blocks from the coarsest to the finest resolution; each has one ResNet more than going down.

    The extra one takes the skip that came from before the down block (its input, or conv_in).
    """
    channels, levels = config.block_out_channels, len(config.block_out_channels)
    blocks = []
    for i, kind in zip(reversed(range(levels)), config.up_block_types, strict=True):
        here, below = channels[i], channels[min(i + 1, levels - 1)]
        layers = per_level(config.layers_per_block, levels)[i]
        skips = [here] * layers + [channels[max(i - 1, 0)]]
        inputs = [below] + [here] * layers
        pairs = [(x + skip, here) for x, skip in zip(inputs, skips, strict=True)]
        transformer = _transformers(config, i) if kind.startswith("CrossAttn") else None
        double = here if i > 0 else None
        blocks.append(UpBlock(pairs, _resnets(config, time_width), transformer, upsample=double))
    return blocks


def _index_cross_attentions(unet: UNet) -> tuple[Attention, ...]:
    """Number the cross-attentions, so that each finds its keys and values in a ContextKV."""
    found = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    for index, attention in enumerate(found):
        attention.index = index
    return tuple(found)
