"""Changes of a layer's weight that are made of small matrices: LoRA, LoHa, LoKr, DoRA.

    LoRA:  W' = W + ΔW,   ΔW = (α/r) B A                    A: (r, in), B: (out, r)
    LoHa:  ΔW = (α/r) (B₁ A₁) ⊙ (B₂ A₂)
    LoKr:  ΔW = (α/r) C ⊗ D                                  C, D: matrices, or products B A
    DoRA:  W' = m (W + ΔW) / ‖W + ΔW‖                        norms and m per output channel

For a convolution A holds r kernels and B mixes them, so that ΔW flattened is the same product; or
a core T of r×r kernels stands between two matrices (Tucker): Σ_ij B_oi T_ij A_jc.
A strength s goes the straight way: W + s (W' − W).

Source:  LoRA: Hu et al. 2021, section 4.1, arXiv:2106.09685.  DoRA: Liu et al. 2024, eq. 5,
         arXiv:2402.09353.  LoHa: Hyeon-Woo et al. 2022, proposition 1, arXiv:2108.06098.  LoKr and
         the core: Yeh et al. 2024, section 3, arXiv:2309.14859.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.down.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) or (out, in, kh, kw) of ΔW; kernels may be flat."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self, weight: Tensor) -> Tensor:
        """W' − W in float32, in the shape of the weight W and where it is."""
        w = weight.detach().float()
        up, down = (part.to(w).flatten(1) for part in (self.up, self.down))
        return redirected(w, self.scale * (up @ down).reshape(w.shape), self.magnitude)


@dataclass(frozen=True)
class Factor:
    """A matrix (out, in) or kernels (out, in, kh, kw), whole or as a product."""

    up: Tensor
    """The matrix itself where it is whole; B, (out, r), and with a core (r, out)."""
    down: Tensor | None = None
    """A, (r, in) or (r, in·kh·kw) or (r, in, kh, kw); None: the matrix is whole."""
    core: Tensor | None = None
    """T, (r, r, kh, kw)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the product. Raises: ValueError: there is none."""
        if self.down is None:
            return tuple(self.up.shape)
        ranks = [len(self.down), *(self.core.shape[:2] if self.core is not None else ())]
        ranks += [len(self.up) if self.core is not None else self.up.shape[1]]
        if self.up.ndim != 2 or len(set(ranks)) > 1:
            raise ValueError(f"{tuple(self.up.shape)} and {tuple(self.down.shape)} differ in rank")
        if self.core is None:
            return (len(self.up), *self.down.shape[1:])
        return (self.up.shape[1], self.down.shape[1], *self.core.shape[2:])

    def product(self) -> Tensor:
        """The matrix in float32."""
        up = self.up.float()
        if self.down is None:
            return up
        down = self.down.float()
        if self.core is not None:
            return torch.einsum("ij...,io,jc->oc...", self.core.float(), up, down)
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])


@dataclass(frozen=True)
class Combined:
    """The change of one layer's weight by LoHa, LoKr or LoRA with a core."""

    kind: Literal["hadamard", "kronecker", "core"]
    factors: tuple[Factor, ...]
    """Two; one where the kind is core."""
    scale: float
    """α/r."""
    magnitude: Tensor | None = None
    """DoRA's m, (out,); None: none."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.factors[0].up.dtype

    def _change(self) -> Tensor:
        first, *rest = (factor.product() for factor in self.factors)
        if self.kind == "core":
            return self.scale * first
        second = rest[0]
        if self.kind == "hadamard":
            return self.scale * first * second
        first = first[(..., *[None] * (second.ndim - first.ndim))]
        return self.scale * torch.kron(first.contiguous(), second.contiguous())  # it takes views

    @property
    def shape(self) -> tuple[int, ...]:
        """See `LowRank.shape`. Raises: ValueError: the factors cannot be multiplied."""
        shapes = [factor.shape for factor in self.factors]
        if self.kind != "kronecker":
            if len(set(shapes)) > 1:
                raise ValueError(f"factors of {shapes[0]} and {shapes[1]} cannot be multiplied")
            return shapes[0]
        (rows, columns), (out, inner, *kernel) = shapes
        return (rows * out, columns * inner, *kernel)

    def delta(self, weight: Tensor) -> Tensor:
        """W' − W in float32, in the shape of the weight W and where it is."""
        w = weight.detach().float()
        return redirected(w, self._change().to(w).reshape(w.shape), self.magnitude)


Change = LowRank | Combined


def fits(change: Change, weight: Tensor) -> bool:
    """Whether a weight (out, in) or (out, in, kh, kw) can have a change."""
    out, *rest = change.shape
    own = change.magnitude
    return (
        weight.ndim > 1
        and not (isinstance(change, LowRank) and change.up[0].numel() != change.rank)
        and out == len(weight)
        and math.prod(rest) == weight[0].numel()
        and (own is None or len(own) == len(weight))
    )


def redirected(w: Tensor, change: Tensor, magnitude: Tensor | None) -> Tensor:
    """A change of W, with DoRA's magnitudes where there are any: W' − W."""
    if magnitude is None:
        return change
    # Of a row of zeros the direction is none, and the row stays.
    norm = (w + change).flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    factor = (magnitude.to(w) / norm).reshape(-1, *[1] * (w.ndim - 1))
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


def beside(change: Change, layer: Layer, weight: Tensor, strength: float) -> Branch | Difference:
    """A forward hook that adds a change to a layer's output, the weight left as it is.

    LoRA costs two thin products; the change of all others is held as a whole matrix.

    Args:    weight: W that the change is of, when the layer holds another by now.
             strength: s, may be negative.
    """
    if isinstance(change, LowRank) and change.magnitude is None:
        return Branch(change, layer, strength)
    return Difference({"weight": change.delta(weight)}, strength)


class Branch:
    """The hook of a LoRA: s (α/r) B (A x)."""

    def __init__(self, change: LowRank, layer: Layer, strength: float) -> None:
        ends = (1,) * (layer.weight.ndim - 2)
        self._down = change.down.reshape(change.rank, *layer.weight.shape[1:])
        up = strength * change.scale * change.up.float()
        self._up = up.reshape(-1, change.rank, *ends)

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the layer's output with the change added."""
        x = inputs[0]
        self._down, self._up = self._down.to(x), self._up.to(x)
        mix: Callable[..., Tensor] = F.linear if isinstance(layer, nn.Linear) else F.conv2d
        return output + mix(_apply(layer, x, self._down), self._up)


class Difference:
    """The hook of changes of a layer's weight and bias that are not of low rank.

    The layer's output is linear in both, so that with the changes in their place it is the change.

    Args:    changes: of `weight` and `bias`, in their shapes.  strength: s, may be negative.
    """

    def __init__(self, changes: Mapping[str, Tensor], strength: float) -> None:
        self._changes = {name: strength * change.float() for name, change in changes.items()}

    def __call__(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the layer's output with the change added."""
        self._changes = {name: change.to(output) for name, change in self._changes.items()}
        if "weight" in self._changes:
            return output + _apply(layer, inputs[0], **self._changes)
        ends = (1,) * (output.ndim - 2) if isinstance(layer, nn.Conv2d | nn.GroupNorm) else ()
        return output + self._changes["bias"].reshape(-1, *ends)


def _apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the layer does, with another weight and bias."""
    match layer:
        case nn.Linear():
            return F.linear(x, weight, bias)
        case nn.GroupNorm():
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        case nn.LayerNorm():
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        case nn.Conv2d():
            return layer._conv_forward(x, weight, bias)
    raise TypeError(type(layer).__name__)


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The layers of a network whose weights can have a change of low rank, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def norms_of(module: nn.Module) -> dict[str, nn.GroupNorm | nn.LayerNorm]:
    """The norms of a network, whose changes are not of low rank, by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}


@torch.no_grad()
def add_to(parameter: Tensor, delta: Tensor) -> None:
    """Change a weight or bias in place; the sum is taken in float32."""
    parameter.copy_(parameter.float() + delta.to(parameter.device))
