"""Low-rank changes of a layer's weight: LoRA and DoRA.

    LoRA:  W' = W + ΔW,   ΔW = (α/r) B A                    A: (r, in), B: (out, r)
    DoRA:  W' = m (W + ΔW) / ‖W + ΔW‖                        norms and m per output channel

For a convolution A holds r kernels and B mixes them, so that ΔW flattened is the same product.
A strength s goes the straight way: W + s (W' − W).

Source:  LoRA: Hu et al. 2021, section 4.1, arXiv:2106.09685.  DoRA: Liu et al. 2024, eq. 5,
         arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: A layer whose weight can be changed.
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class LowRank:
    """The change of one layer's weight."""

    down: Tensor
    """A, (r, in) or (r, in, kh, kw)."""
    up: Tensor
    """B, (out, r) or (out, r, 1, 1)."""
    alpha: float
    """α; equal to the rank, the change is B A itself."""
    magnitude: Tensor | None = None
    """DoRA's m, (out,); None: plain LoRA."""

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank

    def fits(self, weight: Tensor) -> bool:
        """Whether a weight (out, in) or (out, in, kh, kw) can be changed by this."""
        return (
            len(self.up) == len(weight)
            and self.up[0].numel() == self.rank
            and self.down[0].numel() == weight[0].numel()
            and (self.magnitude is None or len(self.magnitude) == len(weight))
        )

    def delta(self, weight: Tensor) -> Tensor:
        """W' − W in float32, in the shape of the weight W and where it is."""
        w = weight.detach().float()
        up, down = (part.to(w).flatten(1) for part in (self.up, self.down))
        change = self.scale * (up @ down).reshape(w.shape)
        if self.magnitude is None:
            return change
        # Of a row of zeros the direction is none, and the row stays.
        norm = (w + change).flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        factor = (self.magnitude.to(w) / norm).reshape(-1, *[1] * (w.ndim - 1))
        return factor * (w + change) - w


def nearest(delta: Tensor, rank: int) -> LowRank:
    """The plain LoRA of a rank that is nearest to a change of a weight in the Frobenius norm.

    Args:    delta: ΔW in the shape of the weight.  rank: r; of a smaller matrix all it has.
    Source:  Eckart & Young 1936, doi.org/10.1007/BF02288367: the first r singular values.
    """
    flat = delta.flatten(1)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    ends = (1,) * (delta.ndim - 2)
    down = (root[:, None] * right[:rank]).reshape(rank, *delta.shape[1:])
    return LowRank(down, (left[:, :rank] * root).reshape(-1, rank, *ends), float(rank))


class Branch:
    """A forward hook that adds a change to a layer's output, the weight left as it is.

    LoRA costs two thin products; DoRA's change is held as a whole matrix.

    Args:    weight: W that the change is of, when the layer holds another by now.
             strength: s, may be negative.
    """

    def __init__(self, change: LowRank, layer: Layer, weight: Tensor, strength: float) -> None:
        if change.magnitude is None:
            down = change.down.reshape(change.rank, *layer.weight.shape[1:])
            ends = (1,) * (layer.weight.ndim - 2)
            up = strength * change.scale * change.up.float()
            self._parts = [down, up.reshape(-1, change.rank, *ends)]
        else:
            self._parts = [strength * change.delta(weight)]

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the layer's output with the change added."""
        x = inputs[0]
        first = self._parts[0]
        if first.dtype != x.dtype or first.device != x.device:  # the model has been moved
            self._parts = [part.to(x) for part in self._parts]
        y = _apply(layer, x, self._parts[0])
        if len(self._parts) == 2:
            mix: Callable[..., Tensor] = F.linear if isinstance(layer, nn.Linear) else F.conv2d
            y = mix(y, self._parts[1])
        return output + y


def _apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """What the layer does, with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return layer._conv_forward(x, weight, None)


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The layers of a network whose weights can be changed, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


@torch.no_grad()
def add_to(layer: Layer, delta: Tensor) -> None:
    """Change a weight in place; the sum is taken in float32."""
    layer.weight.copy_(layer.weight.float() + delta)
