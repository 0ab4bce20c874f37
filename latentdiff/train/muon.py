"""Muon: momentum whose matrices are made orthogonal before each step.

    M ← μ M + (1 − μ) G,   U = (1 − μ) G + μ M   (Nesterov),   W ← (1 − η λ) W − η ρ O(U)

O(U) = (U Uᵀ)^(−1/2) U makes all singular values about 1; ρ = 0.2 √max(rows, columns) gives the step
the size that AdamW's has, so learning rates carry over. Kernels count as (out, in·height·width).

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, eq. 4,
arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from latentdiff.precision import has_fast_bf16

#: Quintic p(x) = a x + b x³ + c x⁵, five times over: singular values in (0, 1] go near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
#: Matrices of at most so many values are computed in stacks on a GPU.
SMALL = 2**20


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about (U Uᵀ)^(−1/2) U of matrices (…, m, n) in float32; singular values 0.7 … 1.2."""
    if matrix.ndim == 3 and len(matrix) == 1:
        return orthogonalize(matrix[0])[None]  # a plain product is faster than a batched one
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.float().mT if tall else matrix.float()
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    long = wide.shape[-1] > 3 * wide.shape[-2]
    result = _by_gram(wide) if long else _directly(wide)
    return result.mT if tall else result


def _directly(wide: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    if has_fast_bf16(wide.device):
        wide = wide.bfloat16()
    for _ in range(ROUNDS):
        gram = wide @ wide.mT
        factor = _added(gram, gram, gram, b, c)
        wide = _added(wide, factor, wide, a, 1.0)
    return wide.float()


def _by_gram(wide: Tensor) -> Tensor:
    """The same for long rows (3×3 kernels) with a third of the work.

    The polynomial is applied to the small Gram matrix and multiplied onto U once: all factors are
    polynomials of the same U Uᵀ, so they commute. The Gram matrix needs 32 bit: rounded to 16 it
    has negative eigenvalues where U has none, and the powers blow those up.
    """
    a, b, c = COEFFICIENTS
    gram = total = wide @ wide.mT
    for number in range(ROUNDS):
        factor = _added(gram, gram, gram, b, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor @ total if number else factor
        if number + 1 < ROUNDS:
            gram = factor @ gram @ factor
    return total @ wide


def _added(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> Tensor:
    """β base + α left @ right, of matrices or stacks of them, in one call."""
    add = torch.addmm if base.ndim == 2 else torch.baddbmm
    return add(base, left, right, beta=beta, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Muon for the groups marked `matrices`, Adam for the others (vectors, first and last layer).

    Args:
        groups: parameter groups, each with `matrices: bool`.
        lr: learning rate η, on AdamW's scale.
        momentum: μ of the matrices.
        betas, eps: Adam's.
        weight_decay: λ of the matrices.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients.

        Where the attribute `found_inf` is set to a tensor above 0, weights and moments stay as
        they are, without the host looking (only Adam's count of steps goes on).
        """
        del closure
        bad: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            for weight in weights:
                self._start(weight, group)
            change = self._change_matrices if group["matrices"] else self._change_vectors
            for alike in self._alike(weights, group["matrices"]):
                change(alike, group, bad)

    def _start(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if state:
            return
        if not group["matrices"]:
            state["step"] = torch.tensor(0.0)
        names = ("momentum",) if group["matrices"] else ("exp_avg", "exp_avg_sq")
        state |= {name: torch.zeros_like(weight) for name in names}

    def _alike(self, weights: list[Tensor], matrices: bool) -> list[list[Tensor]]:
        """What is computed together: vectors of one age; matrices of one shape.

        A GPU is busy with a stack of small matrices and idle with each alone; a CPU core is not,
        nor is a GPU with a large one, of which copies take much memory.
        """
        found: dict[Any, list[Tensor]] = {}
        for number, weight in enumerate(weights):
            age = self.state[weight].get("step")
            key = self._key(weight, number) if matrices else float(age)
            found.setdefault(key, []).append(weight)
        return list(found.values())

    def _key(self, weight: Tensor, number: int) -> Any:
        alone = weight.device.type == "cpu" or weight.numel() > SMALL
        return number if alone else tuple(weight.shape)

    def _change_matrices(
        self, weights: list[Tensor], group: dict[str, Any], bad: Tensor | None
    ) -> None:
        rate, momentum = group["lr"], group["momentum"]
        moments = [self.state[w]["momentum"] for w in weights]
        old, before = _stack(weights), _stack(moments)
        gradient = _stack([w.grad for w in weights if w.grad is not None])
        moment = before.lerp(gradient, 1 - momentum)
        update = orthogonalize(gradient.lerp(moment, momentum))
        scale = 0.2 * max(update.shape[1:]) ** 0.5
        new = (old * (1 - rate * group["weight_decay"])).add_(update, alpha=-rate * scale)
        shape = weights[0].shape
        for targets, value, kept in ((weights, new, old), (moments, moment, before)):
            value = value if bad is None else torch.where(bad > 0, kept, value)
            torch._foreach_copy_(targets, [v.reshape(shape) for v in value.unbind()])

    def _change_vectors(
        self, weights: list[Tensor], group: dict[str, Any], bad: Tensor | None
    ) -> None:
        first, second = group["betas"]
        states = [self.state[w] for w in weights]
        for state in states:
            state["step"] += 1
        count = float(states[0]["step"])
        names = ("exp_avg", "exp_avg_sq")
        parts = [weights, *([state[name] for state in states] for name in names)]
        old = [torch.cat([part.flatten() for part in each]) for each in parts]
        gradient = torch.cat([w.grad.flatten() for w in weights if w.grad is not None])
        mean, square = old[1].lerp(gradient, 1 - first), old[2].lerp(gradient.square(), 1 - second)
        root = (square / (1 - second**count)).sqrt_().add_(group["eps"])
        weight = old[0].addcdiv(mean, root, value=-group["lr"] / (1 - first**count))
        for targets, value, kept in zip(parts, (weight, mean, square), old, strict=True):
            value = value if bad is None else torch.where(bad > 0, kept, value)
            pieces = value.split([t.numel() for t in targets])
            shaped = [v.view(t.shape) for v, t in zip(pieces, targets, strict=True)]
            torch._foreach_copy_(targets, shaped)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Kernels and matrices (out, …) as (count, out, rest)."""
    if len(tensors) == 1:
        return tensors[0].reshape(1, len(tensors[0]), -1)
    return torch.stack([t.reshape(len(t), -1) for t in tensors])
