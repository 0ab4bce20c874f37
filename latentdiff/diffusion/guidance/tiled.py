"""An image larger than the network's, in overlapping tiles that agree at every step.

At each step every tile is denoised by itself, and the estimate at a position is the mean of those
of the tiles that hold it, weighted so that a tile fades towards its border:

    x̂ = Σ_k w_k ⊙ D(x_t restricted to tile k) / Σ_k w_k

There is one x_t, so the tiles share their overlap's past and no seam can form.

Source: MultiDiffusion, Bar-Tal et al. 2023, eq. 3-5, arXiv:2302.08113.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import Denoiser

#: The part of a tile's side that its neighbour has too, at least.
OVERLAP = 0.25


def tiled(denoiser: Denoiser, tile: tuple[int, int]) -> Denoiser:
    """A denoiser for any size from one for tiles.

    Args:    denoiser: of (B, C, h, w) up to `tile` (h, w).
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        rows, columns = (_spans(*sides) for sides in zip(x_t.shape[-2:], tile, strict=True))
        if len(rows) == len(columns) == 1:
            return denoiser(x_t, t)
        total, weights = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        for row in rows:
            for column in columns:
                part = denoiser(x_t[..., row, column], t)
                w = torch.outer(*(_fade(side).to(part) for side in part.shape[-2:]))
                total[..., row, column] += w * part
                weights[..., row, column] += w
        return total / weights

    return denoise


def _spans(side: int, tile: int) -> list[slice]:
    """Where tiles of equal sides begin and end, evenly spread."""
    if side <= tile:
        return [slice(0, side)]
    count = 1 + math.ceil((side - tile) / (tile * (1 - OVERLAP)))
    starts = [round(k * (side - tile) / (count - 1)) for k in range(count)]
    return [slice(start, start + tile) for start in starts]


def _fade(side: int) -> Tensor:
    """1 … side/2 … 1: a weight in each position, never 0."""
    k = torch.arange(side)
    return torch.minimum(k + 1, side - k)
