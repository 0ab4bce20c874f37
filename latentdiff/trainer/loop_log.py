"""The numbers of a run: losses read from the device now and then, speed, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.trainer.batches import Prefetch
from latentdiff.trainer.descent import Descent
from latentdiff.trainer.diagnosis import BadSteps, Remedies, finite_or_none
from latentdiff.trainer.interrupt import StopSignal
from latentdiff.trainer.order import BatchShape
from latentdiff.trainer.tracking import Tracker

if TYPE_CHECKING:
    from latentdiff.trainer.loop import LoopConfig


class Log:
    """Reads the kept losses from the device now and then, and decides when to stop."""

    def __init__(
        self,
        descent: Descent,
        shape: BatchShape,
        config: LoopConfig,
        tracker: Tracker,
        batches: Prefetch[Any],
        seconds: float,
        gauges: Callable[[float], dict[str, float]] | None,
    ) -> None:
        self._gauges = gauges or (lambda images_per_second: {})
        self._descent, self._shape, self._config = descent, shape, config
        self._tracker, self._batches = tracker, batches
        self._began = time.monotonic() - seconds
        self._window = (time.monotonic(), 0.0)
        self._has_logged = False
        precision = descent.accelerator.mixed_precision
        keys = ("optimizer.lr", "optimizer.warmup_steps", "loop.mixed_precision")
        self._bad = BadSteps(descent.model.named_parameters, Remedies(*keys, precision))

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, earlier parts included."""
        return time.monotonic() - self._began

    def after(self, done: int, signal: StopSignal) -> bool:
        """Log if it is time to; say whether the run has to stop now."""
        due = done % self._config.log_every == 0
        # A long silence looks like a run that hangs, so the first step is shown at once.
        early = not (due or self._has_logged) and done < self._config.max_steps
        if due or early:
            self.flush(done, speed=due)
        accelerator, limit = self._descent.accelerator, self._config.max_minutes
        stop = bool(signal.number) or (limit is not None and self.seconds > 60 * limit)
        if accelerator.num_processes == 1:
            return stop
        if not due:  # processes agree only now and then: each time they have to wait for each other
            return False
        votes = torch.tensor([float(stop), float(signal.number)], device=accelerator.device)
        votes = accelerator.reduce(votes, "sum")
        signal.number = signal.number or int(votes[1] / votes[0].clamp(min=1))
        return bool(votes[0] > 0)

    def flush(self, done: int, speed: bool = True) -> None:
        """Write the losses of the steps since the last time.

        Args: speed: say too how fast they were. Of the first step alone it would mislead: it waits
            for the first batch, and kernels are chosen or compiled in it.
        """
        history, self._descent.history = self._descent.history, []
        if not history:
            return
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, loss, norm in history])
        # Each process has the mean of its own samples; the gradient norm is common to all.
        values = self._descent.accelerator.reduce(values, "mean").cpu()
        rows: list[dict[str, Any]] = []
        for (step, _, _), (loss, norm) in zip(history, values.tolist(), strict=True):
            rate = self._descent.rate(step - 1)
            rows.append({"step": step, "loss": finite_or_none(loss)})
            rows[-1] |= {"grad_norm": finite_or_none(norm), "lr": rate}
            self._bad.note(rows[-1])
        found = self._speed(len(rows))
        if speed:
            rows[-1] |= found | {"skipped_steps": self._bad.skipped}
        self._has_logged = True
        self._tracker.write(rows)
        finite = [row["loss"] for row in rows if row["loss"] is not None]
        mean = sum(finite) / len(finite) if finite else math.nan
        shown = {"loss": f"{mean:.4f}"}
        if speed:
            shown["images/s"] = f"{found['images_per_second']:.1f}"
            shown["waiting"] = f"{found['waiting']:.0%}"
        self._tracker.progress(done, shown)
        self._bad.check()

    def check_end(self) -> None:
        """Refuse to end as a success what did not. Raises: UserError: see `BadSteps`."""
        self._bad.check_end()

    def _speed(self, steps: int) -> dict[str, float]:
        now, waited = time.monotonic(), self._batches.waited
        elapsed = max(now - self._window[0], 1e-9)
        share = (waited - self._window[1]) / elapsed
        self._window = (now, waited)
        speed = steps * self._shape.total / elapsed
        return {
            "images_per_second": round(speed, 2),
            "waiting": round(min(share, 1.0), 4),
            **self._gauges(speed),
            "seconds": round(self.seconds, 1),
        }
