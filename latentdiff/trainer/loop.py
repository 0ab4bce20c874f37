"""The training loop as a generator.

    for step, batch in training_loop(…):
        loss = …                       # the algorithm is the caller's
        step.backward(loss)
        if step.update():              # true after the last micro-batch of an optimizer step
            ema.update(step.number)

The generator owns accumulation, cadence, resume, logging and stopping; it keeps the losses on the
device and reads them after its first step and every `log_every`, so a GPU is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from signal import Signals
from typing import Literal, TypeVar

import torch
from torch import Tensor

from latentdiff.diffusion.noise import mix
from latentdiff.errors import Interrupted, UserError
from latentdiff.trainer.batches import Prefetch
from latentdiff.trainer.checkpoint import CheckpointError
from latentdiff.trainer.descent import Descent
from latentdiff.trainer.interrupt import StopSignal
from latentdiff.trainer.loop_log import Log
from latentdiff.trainer.order import BatchShape
from latentdiff.trainer.tracking import Tracker

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class LoopConfig:
    """How long the run is, its batches, and what happens how often (in optimizer steps)."""

    max_steps: int = 40_000
    """Optimizer steps of the whole run."""
    max_minutes: float | None = None
    """Stop and export after this wall time, resumed parts included; null is no limit."""
    batch_size: int = 24
    """Pictures that one process computes at a time."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    seed: int = 0
    """Seed of the first weights, the order, the noise and the dropped captions."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Arithmetic of the U-Net; weights and averages stay in 32 bit. auto: bf16 where it is fast."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average, with a warm-up; 0 exports the newest weights."""
    log_every: int = 20
    """Steps between updates of the progress bar and the log; the first comes after one step."""
    probe_memory: bool = True
    """On a GPU, try a micro-batch before the first step; if it does not fit, halve it and double
    gradient_accumulation."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_last: int = 2
    """How many checkpoints are kept."""
    keep_every: int | None = None
    """Keep for good those whose step is a multiple of this, a multiple of checkpoint_every too."""
    tensorboard: bool = True
    """Write TensorBoard files too, if it is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to as well (needs wandb); null is off."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        counts = ("max_steps", "batch_size", "gradient_accumulation", "log_every")
        problems = [
            f"{name} must be at least 1; got {getattr(self, name)}."
            for name in (*counts, "checkpoint_every", "keep_last")
            if getattr(self, name) < 1
        ]
        if self.keep_every is not None and (
            self.keep_every < 1 or self.keep_every % max(1, self.checkpoint_every)
        ):
            problems.append(
                f"keep_every must be a multiple of checkpoint_every={self.checkpoint_every}, or "
                f"null; got {self.keep_every}."
            )
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay must be at least 0 and below 1; got {self.ema_decay}.")
        if self.max_minutes is not None and self.max_minutes <= 0:
            problems.append(f"max_minutes must be above 0; got {self.max_minutes}.")
        return problems


class Step:
    """One micro-batch of an optimizer step, as the loop yields it.

    Attributes:
        number: the optimizer step, counted from 0.
        last: whether this micro-batch completes it.
    """

    def __init__(self, descent: Descent, number: int, last: bool) -> None:
        self._descent, self.number, self.last = descent, number, last

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this micro-batch's mean loss."""
        self._descent.backward(loss)

    def update(self) -> bool:
        """Change the weights if this was the step's last micro-batch; say whether."""
        if self.last:
            self._descent.update(self.number)
        return self.last


def training_loop(
    descent: Descent,
    make_batch: Callable[[int, int], Batch],
    shape: BatchShape,
    config: LoopConfig,
    tracker: Tracker,
    save: Callable[[int, float], None],
    first_step: int = 0,
    seconds: float = 0.0,
    gauges: Callable[[float], dict[str, float]] | None = None,
    look: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Step, Batch]]:
    """Yield every micro-batch of the run; save and log in between.

    Args:
        make_batch: (optimizer step, micro-batch) → batch of this process; runs in a thread.
        save: (steps made, seconds spent) → writes a checkpoint; called on every process.
        first_step, seconds: steps made and time spent before, when resuming.
        gauges: images per second → more numbers for the row of each log point.
        look: called with the steps made after each of them, when its checkpoint is written: what
            fails in looking at the model costs none of it.
    Raises:
        Interrupted: after SIGTERM or SIGINT, with the checkpoint written.
        CheckpointError: the last checkpoint, or the one before stopping, was not; after any
            other the run goes on with a warning.
        UserError: after 20 steps in a row that were not finite, or when the last ones were not.
    """
    keys = (
        (step, micro)
        for step in range(first_step, config.max_steps)
        for micro in range(shape.accumulation)
    )
    batches = Prefetch(make_batch, keys)
    log = Log(descent, shape, config, tracker, batches, seconds, gauges)
    try:
        with StopSignal() as signal:
            for number, micro, batch in batches:
                last = micro == shape.accumulation - 1
                # Dropout, if the model has any, must not depend on how often a run was resumed.
                place = micro * shape.processes + shape.rank
                torch.manual_seed(mix(mix(config.seed, number), place))
                with nullcontext() if last else descent.no_sync():
                    yield Step(descent, number, last), batch
                if last and _after_step(number + 1, signal, log, config, tracker, save, look):
                    return
    except (UserError, Interrupted):
        tracker.close()  # so that it writes what it holds back
        raise


def _after_step(
    done: int,
    signal: StopSignal,
    log: Log,
    config: LoopConfig,
    tracker: Tracker,
    save: Callable[[int, float], None],
    look: Callable[[int], None],
) -> bool:
    """Log, save and look after `done` steps; say whether the run is over before its last step."""
    stop = log.after(done, signal)
    ends = stop or done == config.max_steps
    if ends or done % config.checkpoint_every == 0:
        log.flush(done)
        if ends and not signal.number:
            log.check_end()
        try:
            save(done, log.seconds)
        except CheckpointError as error:
            if ends:
                raise
            tracker.say(f"warning: {error} Training goes on.")
    if stop and signal.number:
        raise Interrupted(
            signal.number,
            f"stopped by {Signals(signal.number).name} after step {done}; the checkpoint is "
            "written. Run the same command with --resume to go on.",
        )
    look(done)
    if stop:
        tracker.say(f"loop.max_minutes={config.max_minutes} is over at step {done}.")
    return stop
