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


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about (U Uᵀ)^(−1/2) U of a matrix (m, n) in float32; singular values 0.7 … 1.2."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.float().T if tall else matrix.float()
    wide = wide / (wide.norm() + 1e-7)
    result = _by_gram(wide) if wide.shape[1] > 3 * wide.shape[0] else _directly(wide)
    return result.T if tall else result


def _directly(wide: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    if has_fast_bf16(wide.device):
        wide = wide.bfloat16()
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * (gram @ gram)) @ wide
    return wide.float()


def _by_gram(wide: Tensor) -> Tensor:
    """The same for long rows (3×3 kernels) with a third of the work.

    The polynomial is applied to the small Gram matrix and multiplied onto U once: all factors are
    polynomials of the same U Uᵀ, so they commute. The Gram matrix needs 32 bit: rounded to 16 it
    has negative eigenvalues where U has none, and the powers blow those up.
    """
    a, b, c = COEFFICIENTS
    gram = wide @ wide.T
    identity = torch.eye(len(gram), device=gram.device)
    total = identity
    for number in range(ROUNDS):
        factor = a * identity + b * gram + c * (gram @ gram)
        total = factor @ total if number else factor
        if number + 1 < ROUNDS:
            gram = factor @ gram @ factor
    return total @ wide


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
            change = self._change_matrix if group["matrices"] else self._change_vector
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                self._start(weight, state, group)
                moving = [weight, *(t for name, t in state.items() if name != "step")]
                before = [t.clone() for t in moving] if bad is not None else []
                change(weight, weight.grad, state, group)
                for now, old in zip(moving, before, strict=False):
                    now.copy_(torch.where(bad > 0, old, now))  # type: ignore[operator, arg-type]

    @staticmethod
    def _start(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if state:
            return
        if not group["matrices"]:
            state["step"] = torch.tensor(0.0)
        names = ("momentum",) if group["matrices"] else ("exp_avg", "exp_avg_sq")
        state |= {name: torch.zeros_like(weight) for name in names}

    @staticmethod
    def _change_matrix(
        weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        rate, momentum = group["lr"], group["momentum"]
        state["momentum"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(state["momentum"], momentum).reshape(len(weight), -1)
        scale = 0.2 * max(update.shape) ** 0.5
        direction = orthogonalize(update).reshape(weight.shape).to(weight.dtype)
        weight.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate * scale)

    @staticmethod
    def _change_vector(
        weight: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        first, second = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
        root = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
        weight.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - first**count))
