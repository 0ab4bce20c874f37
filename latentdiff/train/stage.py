"""The small loop behind the trainers of the pretrained parts (autoencoder and CLIP).

One stage is: some modules, one optimizer each, a function that computes the losses of a step.
The loop owns the learning rate, logging, checkpoints and resume; what a step does is the script's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.config import too_small
from latentdiff.data.images import UnreadableImage
from latentdiff.data.source import Example, Source
from latentdiff.errors import UserError, printable
from latentdiff.files import atomic_file
from latentdiff.train.divergence import BadSteps, Remedies, check_weights, finite_or_none
from latentdiff.train.optimizer import step_if_finite

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = TypeVar("Batch")
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class StageConfig:
    """How long and how fast a stage trains."""

    output: str = "runs/stage"
    """Folder for checkpoints, log and result."""
    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Pictures per step, over all processes."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it decays to zero along a cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Arithmetic; auto is bf16 where it is fast, else no."""
    seed: int = 0
    """Seed of order, augmentation and initial weights."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the newest one is kept."""
    log_every: int = 20
    """Steps between lines of the log."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        counts = dict.fromkeys(("max_steps", "batch_size", "checkpoint_every", "log_every"), 1)
        problems = too_small(self, **counts, warmup_steps=0, weight_decay=0)
        for name in ("learning_rate", "clip_norm"):
            if getattr(self, name) <= 0:
                problems.append(f"{name} must be above 0; got {getattr(self, name)}.")
        return problems


def cosine_rate(step: int, config: StageConfig) -> float:
    """Learning rate at a step: linear warm-up, then a cosine to zero (arXiv:1608.03983)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def sample_indices(step: int, count: int, batch_size: int, seed: int) -> Tensor:
    """Which samples a step uses: a permutation per epoch, a pure function of the inputs."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        for epoch in (positions // count).unique().tolist()
    }
    return torch.cat(
        [order[positions[positions // count == epoch] % count] for epoch, order in orders.items()]
    )


def process_part(config: StageConfig, accelerator: Accelerator) -> slice:
    """The share of every batch that this process computes.

    Raises: UserError: when the batch cannot be shared evenly.
    """
    processes = accelerator.num_processes
    if config.batch_size % processes:
        raise UserError(
            f"stage.batch_size must be a multiple of the {processes} processes; "
            f"got {config.batch_size}."
        )
    return slice(accelerator.process_index, None, processes)


def prefetch(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[tuple[int, Batch]]:
    """Yield (step, make(step)), preparing the next batch in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Batch] = pool.submit(make, start)
        for step in range(start, stop):
            batch = waiting.result()
            if step + 1 < stop:
                waiting = pool.submit(make, step + 1)
            yield step, batch


def check_stage_output(config: StageConfig, resume: bool) -> None:
    """Make the output folder, or refuse one that holds something else, before any work.

    Raises: UserError: a file, a folder with other things in it, no permission, a training that is
            there when `resume` is false, or none when it is true.
    """
    folder = Path(config.output)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if resume and STATE_FILE not in found:
        raise UserError(f"--resume: no checkpoint in {folder}. Leave --resume out.")
    if STATE_FILE in found and not resume:
        raise UserError(
            f"{folder} already holds a training. Add --resume to go on with it, or choose another "
            "output folder."
        )
    if found and not resume:
        raise UserError(
            f"stage.output={folder} is not empty (it holds {', '.join(found[:6])}), and nothing is "
            "ever overwritten. Choose another stage.output=FOLDER."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"stage.output={folder} cannot be written: {error.strerror}.") from error


class Readable:
    """A source whose unreadable pictures are named once and replaced by the next readable one."""

    def __init__(self, source: Source) -> None:
        self.source, self.skipped = source, set[str]()

    def __getitem__(self, index: int) -> Example:
        for offset in range(len(self.source)):
            try:
                return self.source[(index + offset) % len(self.source)]
            except UnreadableImage as problem:
                if problem.name not in self.skipped:
                    self.skipped.add(problem.name)
                    print(f"left out: {printable(str(problem))}", flush=True)
        raise UserError("no picture of the data set can be read; see the lines above.")


class Stage:
    """Checkpoints, learning rate and log of one stage.

    Args:
        modules: the trained modules by name.
        optimizers: one per module, same names.
        config: see StageConfig.
        accelerator: the processes and the precision.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        config: StageConfig,
        accelerator: Accelerator,
    ) -> None:
        self.modules, self.config, self.accelerator = modules, config, accelerator
        self.optimizers = {n: accelerator.prepare(o) for n, o in optimizers.items()}
        self.folder = Path(config.output)
        self.started = time.monotonic()
        self.recent: list[dict[str, Tensor]] = []
        self._descents: list[tuple[Tensor, Tensor]] = []
        self._history: list[tuple[int, Tensor]] = []
        keys = ("stage.learning_rate", "stage.warmup_steps", "stage.mixed_precision")
        self._bad = BadSteps(self._weights, Remedies(*keys, accelerator.mixed_precision))

    @property
    def state_file(self) -> Path:
        return self.folder / STATE_FILE

    def resume(self, wanted: bool) -> int:
        """Return the first step to run; 0 for a new stage (see `check_stage_output`)."""
        if not wanted:
            return 0
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        if state["modules"].keys() != self.modules.keys():
            raise UserError(
                f"--resume: the checkpoint in {self.folder} has {', '.join(state['modules'])}; "
                f"this run trains {', '.join(self.modules)}. Resume with the options and the "
                "version that started it, or start a new run in another output folder."
            )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        return int(state["step"])

    def save(self, step: int) -> None:
        """Write the state after `step` steps; the old file stays until the new one is whole.

        Raises: UserError: the stage has diverged; nothing is written.
        """
        if step == self.config.max_steps:
            self._bad.check_end()
        check_weights({"weight": dict(self._weights())}, step)
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "modules": {n: m.state_dict() for n, m in self.modules.items()},
            "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
        }
        with atomic_file(self.state_file) as new:
            torch.save(state, new)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.modules.values():
            yield from module.named_parameters()

    def step(self, names: Sequence[str], loss: Tensor) -> None:
        """Descend a loss of the named modules: backward, clip each, update, clear.

        A module whose gradient is not finite stays as it is.
        """
        self.accelerator.backward(loss)
        norms = []
        for name in names:
            module, optimizer = self.modules[name], self.optimizers[name]
            norm = self.accelerator.clip_grad_norm_(module.parameters(), self.config.clip_norm)
            if self.accelerator.scaler is None:
                step_if_finite(optimizer.optimizer, norm)
            else:
                optimizer.step()  # the fp16 gradient scaler has the same check
            optimizer.zero_grad()
            norms.append(norm.detach())
        self._descents.append((loss.detach().float(), torch.stack(norms).norm()))

    def set_rate(self, step: int) -> None:
        """Set every optimizer's learning rate for a step."""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = cosine_rate(step, self.config)

    def log(self, step: int, values: dict[str, Tensor]) -> None:
        """Remember a step's values; every `log_every` steps print and write their means.

        Raises: UserError: too many steps in a row were not finite.
        """
        self.recent.append({k: v.detach() for k, v in values.items()})
        if self._descents:
            total = torch.stack([torch.stack(found) for found in self._descents]).sum(0)
            self._history.append((step + 1, total))
            self._descents = []
        if (step + 1) % self.config.log_every and step + 1 < self.config.max_steps:
            return
        if self.accelerator.is_main_process:
            self._write(step + 1, _means(self.recent))
        self.recent = []
        self._count()

    def _write(self, step: int, means: dict[str, float]) -> None:
        seconds = time.monotonic() - self.started
        finite = {k: finite_or_none(v) for k, v in means.items()}
        row: dict[str, Any] = {"step": step, "seconds": round(seconds, 1), **finite}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
        print(f"step {step}/{self.config.max_steps}  {seconds:.0f} s  {text}", flush=True)

    def _count(self) -> None:
        """Read the losses and gradient norms since the last time from the device."""
        if not self._history:
            return
        steps, totals = zip(*self._history, strict=True)
        self._history = []
        # Each process has the loss of its own samples, and all have the same gradients.
        values = self.accelerator.reduce(torch.stack(totals), "mean").tolist()
        for step, (loss, norm) in zip(steps, values, strict=True):
            row = {"step": step, "loss": finite_or_none(loss), "grad_norm": finite_or_none(norm)}
            self._bad.note({**row, "lr": cosine_rate(step - 1, self.config)})
        self._bad.check()


def _means(rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    names = rows[-1].keys()
    found = {n: [float(r[n]) for r in rows if n in r] for n in names}
    return {n: sum(v) / len(v) for n, v in found.items()}


def adamw(module: nn.Module, config: StageConfig, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only, fused."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)
