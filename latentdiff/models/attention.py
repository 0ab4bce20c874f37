"""Attention and the transformer that stands inside the U-Net's blocks.

    Attention(Q, K, V) = softmax(Q Kᵀ / √d) V          (Vaswani et al. 2017, arXiv:1706.03762)

A spatial transformer treats the H·W positions as tokens: self-attention lets them see each other,
cross-attention lets them read the context (Rombach et al. 2022, section 3.3, arXiv:2112.10752).
The context does not change while an image is denoised, so in sampling its keys and values are
computed once, outside the blocks (see `UNet.project_context`). In training every block makes its
own: all its weights are used within its call, which sharding relies on.
Attribute names are those of diffusers, since they are the keys of the weight files. The kernels
that compute the above are PyTorch's own, or xformers when asked for; both take and give
(B, heads, tokens, head_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError, choice_error

AttentionKind = Literal["sdpa", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Pairs of query and key, up to which plain products train faster than the fused kernel on a CPU.
FEW_PAIRS = 64 * 64
#: A CPU's kernel is up to 1.6 times slower for heads whose width is no multiple of this.
EVEN = 8

_INSTEAD = "Use attention 'sdpa', PyTorch's own kernels, which are as fast on current versions."


def attention_backend(kind: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """The function behind a name, after checking that it works on this device.

    Args:    kind: sdpa or xformers.  device, dtype: where the model is now.
    Raises:  UserError: unknown kind, or xformers does not work here, with what is missing.
    """
    if kind not in get_args(AttentionKind):
        raise choice_error("attention", kind, get_args(AttentionKind))
    if kind == "sdpa":
        return sdpa
    try:
        import xformers.ops
    except (ImportError, OSError) as error:
        raise UserError(
            f"attention 'xformers' was asked for, but xformers cannot be imported ({error}). "
            f"Install it with `pip install 'latentdiff[xformers]'`. {_INSTEAD}"
        ) from error
    if device.type != "cuda":
        raise UserError(
            f"attention 'xformers' was asked for, but the model is on {device.type} and xformers "
            f"has operators for CUDA only. Move the model to a GPU first. {_INSTEAD}"
        )
    attend = partial(memory_efficient, xformers.ops)
    attend(*[torch.zeros(1, 1, 1, 32, device=device, dtype=dtype)] * 3)
    return attend


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's scaled dot-product attention, or plain products where its backward pass is slow.

    On CPUs the backward pass of its kernel takes 12 ms and more for 16 tokens, products take 2.
    """
    learns = query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad
    if learns and query.shape[-2] * key.shape[-2] <= FEW_PAIRS:
        return products(query, key, value)
    if query.device.type == "cpu" and query.shape[-1] % EVEN:
        return _widened(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


def _widened(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same with zeros behind every head's channels; they change nothing but the time."""
    width = query.shape[-1]
    q, k, v = (F.pad(x, (0, -width % (2 * EVEN))) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)[..., :width]


def products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q Kᵀ/√d) V as written (Vaswani et al. 2017, eq. 1), with all of Q Kᵀ in memory.

    Scores and softmax have 32 bit at least, as in the fused kernel, whatever autocast says.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = (query.to(exact) * query.shape[-1] ** -0.5) @ key.to(exact).transpose(-1, -2)
        return scores.softmax(-1).to(value.dtype) @ value


def memory_efficient(operators: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' memory-efficient attention, whose own layout is (B, tokens, heads, head_dim).

    Args:    operators: `xformers.ops`.
    Raises:  UserError: when none of its kernels takes these tensors.
    """
    turned = (x.to(query.dtype).transpose(1, 2) for x in (query, key, value))
    try:
        return operators.memory_efficient_attention(*turned).transpose(1, 2)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"attention 'xformers' was asked for, but no kernel of it can be loaded or used with "
            f"PyTorch {torch.__version__} on {query.device} in {query.dtype}. Its kernels load "
            "only beside the PyTorch and CUDA versions that it was built for; "
            f"`python -m xformers.info` lists them and its own. {_INSTEAD} xformers says: "
            f"{str(error).strip()[:300]}"
        ) from error


KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one attention, each (B, heads, tokens, head_dim)."""
Context = Tensor | tuple[KeyValue, ...]
"""What blocks are given: a context (B, tokens, dim), or the keys and values made of it."""


class ContextKV(NamedTuple):
    """All that a U-Net computes of a context alone."""

    pairs: tuple[KeyValue, ...]
    """Keys and values of every cross-attention, in the order of `Attention.index`."""
    pooled: Tensor | None
    """What is added to the time embedding, (B, width), if anything."""


class Attention(nn.Module):
    """Multi-head attention of tokens over themselves or over a context."""

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None = None,
        dropout: float = 0.0,
        upcast: bool = False,
    ) -> None:
        """Build the four projections.

        Args:    width: channels of the tokens, divisible by heads.
                 context_width: channels of the context; None for self-attention.
                 upcast: multiply queries and keys in float32 when the network runs in float16,
                 whose range Stable Diffusion 2's scores exceed.
        """
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.index = 0
        """Place in a ContextKV; set by the U-Net on its cross-attentions."""
        self.attend: Attend = sdpa
        source = width if context_width is None else context_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(source, width, bias=False)
        self.to_v = nn.Linear(source, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def project(self, context: Tensor) -> KeyValue:
        """Keys and values of a context (B, tokens, context_width)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, kv: KeyValue | None = None) -> Tensor:
        """Attend from x (B, N, width) to kv, or to x itself; returns (B, N, width)."""
        key, value = self.project(x) if kv is None else kv
        query = self._split(self.to_q(x))
        if self.upcast and query.dtype == torch.float16:
            query, key, value = query.float(), key.float(), value.float()
        out = self.attend(query, key, value).transpose(1, 2).flatten(2)  # (B, N, width)
        return self.to_out[1](self.to_out[0](out.to(x.dtype) if self.upcast else out))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)


class GatedGelu(nn.Module):
    """h · gelu(g), both halves from one projection (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to (B, N, hidden)."""
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    """The per-token network of a transformer block, four times as wide inside."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = 4 * width
        self.net = nn.ModuleList(
            [GatedGelu(width, hidden), nn.Dropout(dropout), nn.Linear(hidden, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to (B, N, width)."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and residual."""

    def __init__(
        self, width: int, heads: int, context_width: int, dropout: float, upcast: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, None, dropout, upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context_width, dropout, upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, dropout)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map tokens (B, N, width) to (B, N, width)."""
        x = x + self.attn1(self.norm1(x))
        cross = self.attn2
        kv = cross.project(context) if isinstance(context, Tensor) else context[cross.index]
        x = x + cross(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual around them all."""

    def __init__(
        self,
        channels: int,
        heads: int,
        context_width: int,
        *,
        layers: int = 1,
        groups: int = 32,
        linear_projection: bool = False,
        dropout: float = 0.0,
        upcast: bool = False,
    ) -> None:
        """Args: linear_projection: project tokens (SD 2.x) instead of the feature map (SD 1.x)."""
        super().__init__()
        self.linear_projection = linear_projection

        def projection() -> nn.Module:
            if linear_projection:
                return nn.Linear(channels, channels)
            return nn.Conv2d(channels, channels, kernel_size=1)

        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_width, dropout, upcast) for _ in range(layers)
        )
        self.proj_out = projection()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map a feature map (B, C, H, W) to (B, C, H, W)."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        linear = self.linear_projection
        # In channels_last, to tokens and back are views.
        h = self.proj_in(_to_tokens(h)) if linear else _to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        if linear:
            return x + _to_map(self.proj_out(h), height, width)
        return x + self.proj_out(_to_map(h, height, width))


def _to_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H·W, C)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, C, H, W)
