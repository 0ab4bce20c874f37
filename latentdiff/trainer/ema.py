"""A moving average of the weights, which samples better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.trainer.sharding import local, placed_like, release


def decay_at(step: int, decay: float) -> float:
    """Decay after update number `step` (0, 1, …): min(decay, (1 + k)/(10 + k)).

    Without the warm-up the random first weights would stay in the average for 1/(1 − decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Keeps θ̄ ← d θ̄ + (1 − d) θ of a module's trainable parameters in float32.

    Of a sharded module every process averages its own rows; nothing is gathered.

    Args:
        module: the (unwrapped) module; its buffers are not averaged.
        decay: d in 0 … 1; 0 keeps a plain copy of the newest weights.
    Attributes: average: parameter name → the rows that this process has.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self._module = decay, module
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: local(p).float().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (counted from 0)."""
        live = [local(p).float() for p in self._live.values()]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - self.decay_after(step))

    def decay_after(self, step: int) -> float:
        """The share of the old average that stays after optimizer step `step`."""
        return decay_at(step, self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module hold the averaged weights inside a `with` block."""
        kept = {n: local(p).clone() for n, p in self._live.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    def placed(self) -> dict[str, Tensor]:
        """The average as tensors that are sharded as the parameters are."""
        return {n: placed_like(self.average[n], p) for n, p in self._live.items()}

    def load(self, average: dict[str, Tensor]) -> None:
        """Take over the rows that are here of a stored average.

        Raises: KeyError: a parameter is missing.
        """
        for name, value in self.average.items():
            value.copy_(average[name])

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            local(parameter).copy_(values[name])
        release(self._module)
