"""CLIP's text tower: token ids → a state for every position.

    x = token + position;   x ← x + attention(norm(x));   x ← x + mlp(norm(x)), layer by layer

Attention is causal, so the end mark's state has read the whole text. Names and shapes are those of
transformers' CLIPTextModel, so its weight files load strictly. Written here since importing that
class takes three times as long as importing torch.

Source: Radford et al. 2021, section 2.4, arXiv:2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError, choice_error
from latentdiff.models.sizes import check_numbers


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


#: What transformers takes for a key that config.json does not have.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two matrices around an activation."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Attention and MLP, each on normalised input with a residual."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, hidden, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """Tokens and positions."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        # Always loaded, never drawn: drawing on the meta device imports torch's compiler.
        self.token_embedding, self.position_embedding = (
            nn.Embedding(count, width, _weight=torch.empty(count, width))
            for count in (vocabulary, positions)
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map (B, T) to (B, T, D)."""
        tokens = self.token_embedding(token_ids)
        return tokens + self.position_embedding.weight[: tokens.shape[1]]


class ClipText(nn.Module):
    """The whole tower.

    Args:   config: transformers' config.json; kept as `config`, with its defaults.
    Raises: UserError: an activation that CLIP does not have, or sizes that no tower has.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = c = {**DEFAULTS, **config}
        check_numbers("the text encoder", c)
        if c["hidden_act"] not in ACTIVATIONS:
            raise choice_error("the text encoder's hidden_act", c["hidden_act"], ACTIVATIONS)
        width, hidden, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
        if width % heads:
            raise UserError(f"hidden_size must be a multiple of the {heads} heads; got {width}.")
        activation, eps = c["hidden_act"], c["layer_norm_eps"]
        self.embeddings: Any = Embeddings(c["vocab_size"], c["max_position_embeddings"], width)
        layers = [
            Layer(width, heads, hidden, activation, eps) for _ in range(c["num_hidden_layers"])
        ]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map (B, T) to the last states after the final norm, (B, T, width)."""
        x = self.embeddings(token_ids)
        for layer in self.encoder["layers"].children():
            x = layer(x)
        return self.final_layer_norm(x)
