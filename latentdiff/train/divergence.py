"""Steps that are not finite: how many a run may have, and why they are so as far as it shows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.train.distributed import local, share

#: So many steps in a row without a finite loss and gradient end the run.
MAX_BAD_STEPS = 20
#: A last finite loss this many times the first of those before it speaks of divergence.
RISE = 3.0
#: float16's largest number; weights of networks that work lie orders of magnitude below.
HUGE = torch.finfo(torch.float16).max

Named = Iterable[tuple[str, Tensor]]


class BadSteps:
    """Counts the steps whose loss or gradient was not finite, and ends a run that has too many.

    Args:
        weights: gives the model's named parameters, looked at when the run ends.
        precision: no, bf16 or fp16, as settled on this machine.
    Attributes: skipped: steps so far that changed no weights.
    """

    def __init__(self, weights: Callable[[], Named], precision: str) -> None:
        self._weights, self._precision = weights, precision
        self._finite: deque[dict[str, Any]] = deque(maxlen=5)
        self._row: dict[str, Any] = {}
        self._in_a_row = self.skipped = 0

    def note(self, row: dict[str, Any]) -> None:
        """Count a step: its `loss` and `grad_norm` are None where they were not finite."""
        self._row = row
        if row["loss"] is not None and row["grad_norm"] is not None:
            self._in_a_row = 0
            self._finite.append(row)
        else:
            self._in_a_row += 1
            self.skipped += 1

    def check(self) -> None:
        """Raises: UserError: the last steps were not finite, too many to go on."""
        if self._in_a_row >= MAX_BAD_STEPS:
            raise self._error()

    def check_end(self) -> None:
        """Raises: UserError: the run would end with steps that were not finite.

        One gradient that overflowed, after steps that were finite, is passed over: the gradient
        scaling of fp16 finds its factor by that.
        """
        last_is_scaling = self._finite and self._row["loss"] is not None
        if self._in_a_row > (1 if last_is_scaling else 0):
            raise self._error()

    def _error(self) -> UserError:
        count, step = self._in_a_row, self._row["step"]
        last = f"the last {count} steps" if count > 1 else "the last step"
        found = diagnose(self._finite, self._row, self._weights(), self._precision)
        return UserError(
            f"the loss or its gradient was not finite in {last} (now at step {step}), and such a "
            f"step changes no weights. {' '.join(found)} Nothing is exported; checkpoints of "
            "earlier steps are kept."
        )


def diagnose(
    finite: Sequence[dict[str, Any]], bad: dict[str, Any], weights: Named, precision: str
) -> list[str]:
    """Say what the steps before and the weights tell, and what helps.

    Args:
        finite: the last rows with a finite loss and gradient, oldest first; may be empty.
        bad: a row without; its `loss` is None if the loss itself was not finite.
        weights: the model's named parameters.
        precision: no, bf16 or fp16, as settled on this machine.
    Returns: sentences, the most telling first.
    """
    largest = {name: _largest(value) for name, value in weights}
    broken = [name for name, value in largest.items() if not math.isfinite(value)]
    if broken and not finite:
        return [
            f"{len(broken)} of the weights themselves are not finite, the first is {broken[0]}: "
            "the model was broken before this run's first step."
        ]
    name = broken[0] if broken else max(largest, key=lambda n: largest[n], default="")
    if finite and (broken or largest.get(name, 0.0) > HUGE):
        size = "are no longer finite" if broken else f"have grown to {largest[name]:.2g}"
        advice = _lower_rate(finite[-1])
        return [f"The weights {size} ({name}): the run diverged, so {advice}."]
    sentences = [_which(bad), _trend(finite)]
    if precision == "fp16":
        sentences.append("fp16 ends at 65504; loop.mixed_precision=bf16 or no reach further.")
    return sentences


def check_weights(what: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Refuse weights of a diverged run before they replace good ones; for all processes.

    Args:    what: tensors by name, by what they are.
    Raises:  UserError: on every process, when one of them has numbers that are not finite, or
             beyond `HUGE`.
    """
    sizes = (
        (f"{kind} {name}", _largest(value))
        for kind, tensors in what.items()
        for name, value in tensors.items()
    )
    mine = next((found for found in sizes if not found[1] <= HUGE), None)
    if broken := next(filter(None, share(mine)), None):
        size = f"has grown to {broken[1]:.2g}" if math.isfinite(broken[1]) else "is not finite"
        raise UserError(
            f"after step {step} the {broken[0]} {size}: the run diverged. Nothing is written, and "
            "checkpoints of earlier steps are kept. Train with a lower learning rate or a longer "
            "warm-up."
        )


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which knows no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _largest(value: Tensor) -> float:
    """Largest magnitude of what this process has of a tensor; NaN where there is one."""
    part = local(value)
    return float(part.abs().max()) if part.numel() and part.is_floating_point() else 0.0


def _lower_rate(row: Mapping[str, Any]) -> str:
    """The advice against divergence. Args: row: of a step, with its rate `lr`."""
    return f"lower optimizer.lr (the rate was {row['lr']:g}) or raise optimizer.warmup_steps"


def _which(bad: dict[str, Any]) -> str:
    if bad["loss"] is None:
        return "The loss itself was not finite, the weights are."
    return f"The loss was finite ({bad['loss']:.4g}), its gradient overflowed in the backward pass."


def _trend(finite: Sequence[dict[str, Any]]) -> str:
    if not finite:
        return "No step of this run was finite: look at the data and the pretrained weights."
    first, last = finite[0], finite[-1]
    if len(finite) == 1:
        return (
            f"Of this run only step {last['step']} was finite (loss {last['loss']:.4g}); an update "
            f"that is too large does that, so {_lower_rate(last)}."
        )
    losses = ", ".join(f"{row['loss']:.4g}" for row in finite)
    norms = ", ".join(f"{row['grad_norm']:.3g}" for row in finite)
    text = f"Before that the losses were {losses} and the gradient norms {norms}"
    if last["loss"] > RISE * first["loss"]:
        return f"{text}: it was diverging, so {_lower_rate(last)}."
    return (
        f"{text}: no sign of divergence, so suspect single images; if those are fine, "
        f"{_lower_rate(last)}."
    )
