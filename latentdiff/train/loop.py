"""The training loop as a generator, for every model that is trained here.

    for step, batch in training_loop(optimizer_step, …):
        loss = …                       # the algorithm is the caller's
        step.backward(loss)
        step.log(psnr=…)               # more numbers for this step's row of the log
        if step.update():              # true after the last micro-batch of an optimizer step
            ema.update(step.number)

The generator owns accumulation, cadence, resume, logging and stopping; it keeps the losses on the
device and reads them after its first step and every `log_every`, so a GPU is not waited for. On
SIGTERM or Ctrl-C the step is finished and its checkpoint written first.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from signal import Signals
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.config import FREE, AtLeastOne, Positive
from latentdiff.diffusion.noise import mix
from latentdiff.errors import Interrupted, UserError
from latentdiff.train.batches import BatchShape, Prefetch
from latentdiff.train.checkpoint import CheckpointError
from latentdiff.train.distributed import is_sharded, whole
from latentdiff.train.divergence import BadSteps, finite_or_none
from latentdiff.train.log import MEBI, Tracker, peak_memory
from latentdiff.train.optimizer import set_learning_rate, step_if_finite

if TYPE_CHECKING:
    from accelerate import Accelerator


class StopSignal:
    """Notes SIGTERM and SIGINT inside a `with` block; a second one acts at once.

    Attributes: number: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
        if kind is None and self.number:  # it came too late to stop what is over by now
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)  # type: ignore[arg-type]
        self._old = {}


class OptimizerStep:
    """What is done to one model in an optimizer step: backward, clip, update, clear.

    Args:
        accelerator: processes and precision.
        model, optimizer: as `accelerator.prepare` returned them.
        rate: optimizer step → learning rate.
        clip_norm: largest gradient norm, 0 for none.
        accumulation: micro-batches per optimizer step.
    Attributes: history: (steps made, loss, gradient norm) of each step since it was last read.
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
        self.history: list[tuple[int, Tensor | None, Tensor]] = []
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
        """Clip, change the weights (unless the gradient is not finite) and note the loss.

        The gradient may come from another model's `backward`; then there is no loss to note.
        """
        parameters, optimizer = list(self.model.parameters()), self.optimizer.optimizer
        limit, scaler = self.clip_norm or math.inf, self.accelerator.scaler
        set_learning_rate(optimizer, self.rate(number))
        if scaler is None:
            norm = whole(self.accelerator.clip_grad_norm_(parameters, limit))
            step_if_finite(optimizer, norm)
        else:  # not by Accelerate, which would unscale the gradients of all optimizers each time
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            scaler.step(optimizer)  # which has the same check
        self.optimizer.zero_grad()
        self.history.append((number + 1, self._loss, norm.detach()))
        self._loss = None


class Log:
    """Reads the kept losses from the device now and then, and decides when to stop."""

    def __init__(
        self,
        optimizer_step: OptimizerStep,
        others: Mapping[str, OptimizerStep],
        shape: BatchShape,
        config: LoopConfig,
        tracker: Tracker,
        batches: Prefetch[Any],
        seconds: float,
        gauges: Callable[[float], dict[str, float]] | None,
    ) -> None:
        self._gauges = gauges or (lambda images_per_second: {})
        self._main, self._others = optimizer_step, others
        self._shape, self._config = shape, config
        self._tracker, self._batches = tracker, batches
        self._values: list[tuple[int, Mapping[str, Tensor]]] = []
        self._began = time.monotonic() - seconds
        self._window = (time.monotonic(), 0.0)
        self._has_logged = False
        self._timed_from: tuple[int, float] | None = None
        self._bad = BadSteps(self._weights, optimizer_step.accelerator.mixed_precision)

    @property
    def _seconds(self) -> float:
        """Wall time of the run so far, earlier parts included."""
        return time.monotonic() - self._began

    def keep(self, number: int, values: Mapping[str, Tensor]) -> None:
        """Keep more numbers of a micro-batch of optimizer step `number` until they are read."""
        self._values.append((number + 1, {n: v.detach() for n, v in values.items()}))

    def end_step(
        self,
        done: int,
        signal: StopSignal,
        save: Callable[[int, float], None],
        after_step: Callable[[int], None],
    ) -> bool:
        """Log, save, call `after_step`; say whether the run is over before its last step."""
        stop = self._log_if_due(done, signal)
        self._estimate(done)
        ends = stop or done == self._config.max_steps
        if ends or done % self._config.checkpoint_every == 0:
            self._flush(done)
            if ends and not signal.number:
                self._bad.check_end()
            try:
                save(done, self._seconds)
            except CheckpointError as error:
                if ends:
                    raise
                self._tracker.say(f"warning: {error} Training goes on.")
        if stop and signal.number:
            raise Interrupted(
                signal.number,
                f"stopped by {Signals(signal.number).name} after step {done}; the checkpoint is "
                "written. Run the same command with --resume to go on.",
            )
        after_step(done)
        if stop:
            self._tracker.say(
                f"loop.max_minutes={self._config.max_minutes} is over at step {done}."
            )
        return stop

    def _log_if_due(self, done: int, signal: StopSignal) -> bool:
        """Log if it is time to; say whether the run has to stop now."""
        due = done % self._config.log_every == 0
        # A long silence looks like a run that hangs, so the first step is shown at once.
        early = not (due or self._has_logged) and done < self._config.max_steps
        if due or early:
            self._flush(done, speed=due)
        accelerator, limit = self._main.accelerator, self._config.max_minutes
        stop = bool(signal.number) or (limit is not None and self._seconds > 60 * limit)
        if accelerator.num_processes == 1:
            return stop
        if not due:  # processes agree only now and then: each time they have to wait for each other
            return False
        votes = torch.tensor([float(stop), float(signal.number)], device=accelerator.device)
        votes = accelerator.reduce(votes, "sum")
        signal.number = signal.number or int(votes[1] / votes[0].clamp(min=1))
        return bool(votes[0] > 0)

    def _estimate(self, done: int) -> None:
        """After ten steps, say how long one takes and when the run will end.

        The very first is left out: it waits for the first batch, and kernels are chosen in it.
        """
        if self._timed_from is None:
            self._timed_from = (done, time.monotonic())
        first, began = self._timed_from
        if done != first + TIMED or done == self._config.max_steps:
            return
        self._flush(done)  # waits for the device
        each, left = (time.monotonic() - began) / TIMED, self._config.max_steps - done
        used = peak_memory(self._main.accelerator.device) / MEBI
        self._tracker.say(
            f"{each:.3g} s a step and {used:,.0f} MB of memory; the {left:,} steps left take about "
            f"{tqdm.format_interval(each * left)}, until {clock(each * left)}"
        )

    def _flush(self, done: int, speed: bool = True) -> None:
        """Write the losses of the steps since the last time.

        Args: speed: say too how fast they were. Of the first step alone it would mislead: it waits
            for the first batch, and kernels are chosen or compiled in it.
        """
        rows = self._read()
        if not rows:
            return
        shown = {n: f"{v:.4f}" for n, v in _means(rows).items() if not n.endswith("grad_norm")}
        for row in rows:
            row["lr"] = self._main.rate(row["step"] - 1)
            self._bad.note(row | self._all_together(row))
            row |= {name: finite_or_none(value) for name, value in row.items()}
        found = self._speed(len(rows))
        if speed:
            rows[-1] |= found | {"skipped_steps": self._bad.skipped}
            shown["images/s"] = f"{found['images_per_second']:.1f}"
            shown["waiting"] = f"{found['waiting']:.0%}"
        self._has_logged = True
        self._tracker.write(rows)
        self._tracker.progress(done, shown)
        self._bad.check()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._main.model.named_parameters()
        for name, other in self._others.items():
            yield from ((f"{name} {n}", p) for n, p in other.model.named_parameters())

    def _read(self) -> list[dict[str, Any]]:
        """Take the numbers of the steps since the last time from the device, a row per step."""
        found: dict[int, dict[str, list[Tensor]]] = {}
        for prefix, one in {
            "": self._main,
            **{f"{n}_": o for n, o in self._others.items()},
        }.items():
            for step, loss, norm in one.history:
                row = found.setdefault(step, {})
                row |= {f"{prefix}loss": [loss]} if loss is not None else {}
                row[f"{prefix}grad_norm"] = [norm]
            one.history = []
        for step, values in self._values:
            for name, value in values.items():
                found.setdefault(step, {}).setdefault(name, []).append(value)
        self._values = []
        if not found:
            return []
        accelerator = self._main.accelerator
        numbers = [n.to(accelerator.device) for r in found.values() for v in r.values() for n in v]
        # Each process has the mean of its own samples; the gradient norm is common to all.
        means = accelerator.reduce(torch.stack([n.float() for n in numbers]), "mean").tolist()
        values = iter(means)
        return [
            {"step": step} | {n: sum(next(values) for _ in v) / len(v) for n, v in row.items()}
            for step, row in found.items()
        ]

    def _all_together(self, row: dict[str, Any]) -> dict[str, float | None]:
        """Loss and gradient norm of all models: one that is not finite makes the step a bad one."""
        names = ["", *(f"{name}_" for name in self._others)]
        loss = sum(row.get(f"{name}loss", 0.0) for name in names)
        norm = math.hypot(*(row.get(f"{name}grad_norm", 0.0) for name in names))
        return {"loss": finite_or_none(loss), "grad_norm": finite_or_none(norm)}

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
            "seconds": round(self._seconds, 1),
        }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of the finite values of each number, NaN where there is none."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    found = {n: [row[n] for row in rows if math.isfinite(row.get(n, math.nan))] for n in names}
    return {n: sum(v) / len(v) if v else math.nan for n, v in found.items()}


def clock(seconds: float) -> str:
    """The time of day in so many seconds, with the date where that is not today."""
    then, now = (datetime.fromtimestamp(time.time() + s) for s in (seconds, 0))
    return f"{then:%H:%M}" if then.date() == now.date() else f"{then:%d %B %H:%M}"


Batch = TypeVar("Batch")
#: Steps over which a step is timed.
TIMED = 10


@dataclass(frozen=True)
class LoopConfig:
    """How long the run is, its batches, and what happens how often (in optimizer steps)."""

    max_steps: AtLeastOne[int] = 40_000
    """Optimizer steps of the whole run."""
    max_minutes: Positive[float] | None = field(default=None, metadata=FREE)
    """Stop and export after this wall time, resumed parts included; null is no limit."""
    batch_size: AtLeastOne[int] = field(default=24, metadata=FREE)
    """Images that one process computes at a time."""
    gradient_accumulation: AtLeastOne[int] = field(default=1, metadata=FREE)
    """Micro-batches per optimizer step."""
    seed: int = 0
    """Seed of the first weights, the order and the noise."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Arithmetic; weights and averages stay in 32 bit. auto: bf16 where it is fast."""
    log_every: AtLeastOne[int] = field(default=20, metadata=FREE)
    """Steps between updates of the progress bar and the log; the first comes after one step."""
    checkpoint_every: AtLeastOne[int] = field(default=500, metadata=FREE)
    """Steps between checkpoints."""
    keep_last: AtLeastOne[int] = field(default=2, metadata=FREE)
    """How many checkpoints are kept."""
    keep_every: AtLeastOne[int] | None = field(default=None, metadata=FREE)
    """Keep for good those whose step is a multiple of this, a multiple of checkpoint_every too."""
    tensorboard: bool = field(default=True, metadata=FREE)
    """Write TensorBoard files too, if it is installed."""
    wandb: str | None = field(default=None, metadata=FREE)
    """Weights & Biases project to log to as well (needs wandb); null is off."""

    def validate(self) -> list[str]:
        """List what does not go together."""
        if self.keep_every is None or self.keep_every % self.checkpoint_every == 0:
            return []
        return [
            f"keep_every must be a multiple of checkpoint_every={self.checkpoint_every}, or "
            f"null; got {self.keep_every}."
        ]


class Step:
    """One micro-batch of an optimizer step, as the loop yields it.

    Attributes:
        number: the optimizer step, counted from 0.
        last: whether this micro-batch completes it.
    """

    def __init__(self, optimizer_step: OptimizerStep, log: Log, number: int, last: bool) -> None:
        self._optimizer_step, self._log, self.number, self.last = optimizer_step, log, number, last
        self._has_loss = False

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this micro-batch's mean loss."""
        self._optimizer_step.backward(loss)
        self._has_loss = True

    def update(self) -> bool:
        """Change the weights if this was the step's last micro-batch; say whether."""
        if not self._has_loss:
            raise RuntimeError("step.update() before step.backward(loss)")
        if self.last:
            self._optimizer_step.update(self.number)
        return self.last

    def log(self, **values: Tensor) -> None:
        """Add numbers to this step's row of the log, each the mean over the micro-batch."""
        self._log.keep(self.number, values)


def training_loop(
    optimizer_step: OptimizerStep,
    make_batch: Callable[[int, int], Batch],
    shape: BatchShape,
    config: LoopConfig,
    tracker: Tracker,
    save: Callable[[int, float], None],
    first_step: int = 0,
    seconds: float = 0.0,
    gauges: Callable[[float], dict[str, float]] | None = None,
    after_step: Callable[[int], None] = lambda done: None,
    others: Mapping[str, OptimizerStep] | None = None,
) -> Iterator[tuple[Step, Batch]]:
    """Yield every micro-batch of the run; save and log in between.

    Args:
        optimizer_step: of the model that the yielded `Step` trains.
        make_batch: (optimizer step, micro-batch) → batch of this process; runs in a thread.
        save: (steps made, seconds spent) → writes a checkpoint; called on every process.
        first_step, seconds: steps made and time spent before, when resuming.
        gauges: images per second → more numbers for the row of each log point.
        after_step: called with the steps made so far, after each and when its checkpoint is
            written: a failing validation costs no step.
        others: of models that the caller's own code trains in the same steps, a discriminator say,
            by the name that their numbers have in the log.
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
    others = others or {}
    log = Log(optimizer_step, others, shape, config, tracker, batches, seconds, gauges)
    try:
        with StopSignal() as signal:
            for number, micro, batch in batches:
                last = micro == shape.accumulation - 1
                # Dropout, if the model has any, must not depend on how often a run was resumed.
                place = micro * shape.processes + shape.rank
                torch.manual_seed(mix(mix(config.seed, number), place))
                with ExitStack() as no_sync:
                    for one in () if last else (optimizer_step, *others.values()):
                        no_sync.enter_context(one.no_sync())
                    yield Step(optimizer_step, log, number, last), batch
                if last and optimizer_step.accelerator.scaler is not None:
                    optimizer_step.accelerator.scaler.update()
                if last and log.end_step(number + 1, signal, save, after_step):
                    return
    except (UserError, Interrupted):
        tracker.close()  # so that it writes what it holds back
        raise
