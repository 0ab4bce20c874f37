"""The context pooled into one vector, which joins the time embedding in every ResNet block.

A query made of the tokens' mean attends to the mean and all tokens; the result is projected to the
width of the time embedding, with a LayerNorm before and after.
Attribute names are those of diffusers, since they are the keys of the weight files.

Source: DeepFloyd IF, github.com/deep-floyd/IF, after the pooling of Radford et al. 2021,
        section 2.4, arXiv:2103.00020; diffusers' addition_embed_type "text".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.models.attention import sdpa


class AttentionPooling(nn.Module):
    """Multi-head attention with one query, the mean of the tokens plus a learned offset."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, N, width) to (B, width)."""
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding.to(tokens.dtype)
        tokens = torch.cat([mean, tokens], dim=1)
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, head_dim)
            for projection, x in ((self.q_proj, mean), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return sdpa(query, key, value).flatten(1)


class TextTimeEmbedding(nn.Module):
    """The context's share of the embedding that the ResNet blocks are given."""

    def __init__(self, context_width: int, time_width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(context_width)
        self.pool = AttentionPooling(context_width, heads)
        self.proj = nn.Linear(context_width, time_width)
        self.norm2 = nn.LayerNorm(time_width)

    def forward(self, context: Tensor) -> Tensor:
        """Map (B, tokens, context_width) to (B, time_width)."""
        return self.norm2(self.proj(self.pool(self.norm1(context))))
