"""Telling the U-Net how noisy its input is: timestep → features → embedding.

Two kinds of features, both computed in float32 whatever the network's dtype, because a timestep
near 1000 has no room for fractions in 16 bit:

    sinusoidal   [cos ω_i t, sin ω_i t] with fixed ω_i from 1 down to 1/10000
    fourier      [sin 2π w_i t, cos 2π w_i t] with fixed random w_i

Sources: Vaswani et al. 2017, section 3.5, arXiv:1706.03762; Tancik et al. 2020, arXiv:2006.10739.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Standard deviation of the random frequencies on timesteps 0 … 999: the 16 that is customary for
#: times in 0 … 1. With 1 instead, neighbouring timesteps would get unrelated features.
FOURIER_SCALE = 16 / 1000


class SinusoidalFeatures(nn.Module):
    """Sines and cosines of geometrically spaced frequencies; has no weights."""

    def __init__(self, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> None:
        """Args: width: features. flip_sin_to_cos: cosines first. freq_shift: see diffusers."""
        super().__init__()
        self.width, self.flip_sin_to_cos, self.freq_shift = width, flip_sin_to_cos, freq_shift

    def forward(self, t: Tensor) -> Tensor:
        """Features of timesteps t (B,), as (B, width) float32."""
        half = self.width // 2
        index = torch.arange(half, dtype=torch.float32, device=t.device)
        omega = torch.exp(-math.log(10_000) * index / (half - self.freq_shift))
        features = _waves(t.float()[:, None] * omega, self.flip_sin_to_cos)
        return F.pad(features, (0, self.width % 2))


class FourierFeatures(nn.Module):
    """Sines and cosines of random frequencies, drawn once, kept in float32 and not trained."""

    def __init__(self, width: int, flip_sin_to_cos: bool = True) -> None:
        super().__init__()
        self.flip_sin_to_cos = flip_sin_to_cos
        frequencies = FOURIER_SCALE * torch.randn(width // 2)
        self.weight = nn.Parameter(frequencies, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """Features of timesteps t (B,), as (B, width) float32."""
        angle = t.float()[:, None] * self.weight * (2 * math.pi)
        return _waves(angle, self.flip_sin_to_cos)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierFeatures:
        # Follow .to(device) but not .half(): rounded frequencies are wrong by whole turns.
        moved = fn(self.weight)
        if not (self.weight.is_meta or moved.is_meta):
            moved = self.weight.detach().to(moved.device)
        self.weight = nn.Parameter(moved.detach().float(), requires_grad=False)
        return self


class TimestepEmbedding(nn.Module):
    """Two linear layers that turn timestep features into the embedding the ResNet blocks add."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, features) to (B, width)."""
        return self.linear_2(F.silu(self.linear_1(features)))


def _waves(angle: Tensor, cosine_first: bool) -> Tensor:
    sine, cosine = angle.sin(), angle.cos()
    return torch.cat([cosine, sine] if cosine_first else [sine, cosine], dim=-1)
