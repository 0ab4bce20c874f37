"""Why a run's numbers stopped being finite, as far as its own record shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

#: A last finite loss this many times the one before it speaks of divergence.
RISE = 3.0


def diagnose(
    finite: Sequence[dict[str, Any]],
    bad: dict[str, Any],
    weights: Iterable[tuple[str, Tensor]],
) -> list[str]:
    """Say what the steps before and the weights tell.

    Args:
        finite: the last rows with a finite loss and gradient, oldest first; may be empty.
        bad: a row without; its `loss` is None if the loss itself was not finite.
        weights: the model's named parameters.
    Returns: sentences, the most telling first.
    """
    broken = [name for name, value in weights if not _is_finite(value)]
    if broken:
        return [
            f"{len(broken)} of the weights themselves are not finite, the first is {broken[0]}: "
            "the model was broken before this run, or its number format is too narrow for it."
        ]
    said = [_which(bad)]
    if not finite:
        said.append("No step of this run was finite: look at the data and the pretrained weights.")
    else:
        said.append(_trend(finite))
    return said


def _is_finite(value: Tensor) -> bool:
    part = getattr(value, "to_local", None)  # of sharded weights each process looks at its own
    return bool((value if part is None else part()).isfinite().all())


def _which(bad: dict[str, Any]) -> str:
    if bad["loss"] is None:
        return "The loss itself was not finite, the weights are."
    return (
        f"The loss was finite ({bad['loss']:.4g}) and its gradient was not: the backward pass "
        "overflowed, which a narrow number format (fp16) or a huge loss does."
    )


def _trend(finite: Sequence[dict[str, Any]]) -> str:
    losses = ", ".join(f"{row['loss']:.4g}" for row in finite)
    norms = ", ".join(f"{row['grad_norm']:.3g}" for row in finite)
    text = f"Before that the losses were {losses} and the gradient norms {norms}"
    first, last = finite[0]["loss"], finite[-1]["loss"]
    if last > RISE * first and math.isfinite(last):
        return text + ": it was diverging, so lower optimizer.lr or raise optimizer.warmup_steps."
    return text + ": no sign of divergence, so suspect single pictures or the number format."
