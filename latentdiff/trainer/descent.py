"""One optimizer step of a model: gradients added up, clipped, applied, forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from latentdiff.trainer.optimizer import set_learning_rate, step_if_finite
from latentdiff.trainer.sharding import is_sharded, whole

if TYPE_CHECKING:
    from accelerate import Accelerator


class Descent:
    """A model on its way down: backward, clip, update, clear.

    Args:
        accelerator: processes and precision.
        model, optimizer: as `accelerator.prepare` returned them.
        rate: optimizer step → learning rate.
        clip_norm: largest gradient norm, 0 for none.
        accumulation: micro-batches per optimizer step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        rate: Callable[[int], float],
        clip_norm: float,
        accumulation: int,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.rate, self.clip_norm, self.accumulation = rate, clip_norm, accumulation
        self.history: list[tuple[int, Tensor, Tensor]] = []
        self._loss: Tensor | None = None

    def no_sync(self) -> AbstractContextManager[Any]:
        """Within it processes do not exchange gradients (the last micro-batch of a step does).

        Shards exchange theirs at once: only so do gradients take as little memory as weights.
        """
        return nullcontext() if is_sharded(self.model) else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's gradient."""
        share = loss / self.accumulation
        self.accelerator.backward(share)
        share = share.detach().float()
        self._loss = share if self._loss is None else self._loss + share

    def update(self, number: int) -> None:
        """Clip, change the weights (unless the gradient is not finite) and note the loss."""
        if self._loss is None:
            raise RuntimeError("step.update() before step.backward(loss)")
        parameters = list(self.model.parameters())
        norm = whole(self.accelerator.clip_grad_norm_(parameters, self.clip_norm or math.inf))
        set_learning_rate(self.optimizer.optimizer, self.rate(number))
        if self.accelerator.scaler is None:
            step_if_finite(self.optimizer.optimizer, norm)
        else:
            self.optimizer.step()  # the fp16 gradient scaler has the same check
        self.optimizer.zero_grad()
        self.history.append((number + 1, self._loss, norm.detach()))
        self._loss = None
