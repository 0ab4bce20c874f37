"""What the training scripts have around their loops: processes, output folder, checkpoints, log.

    run = Run(config, resume)                    # everything is checked, nothing written
    run.open_output()                            # the folder is this run's from here on
    run.load_state(models, optimizers, facts)    # a resumed run has its weights again
    run.open_log()
    for step, batch in run.loop(optimizer_step, make_batch):
        ...
    run.end()

Optional packages are looked for before a run writes anything.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.config import to_dict
from latentdiff.data.source import EXAMPLE, DataConfig
from latentdiff.errors import UserError
from latentdiff.files import write_text
from latentdiff.plain_yaml import to_yaml
from latentdiff.train.batches import BatchShape, Order, rebalance
from latentdiff.train.checkpoint import TrainingState, stored_facts
from latentdiff.train.config import RunConfig, TrainConfig, deciding_facts, default_facts
from latentdiff.train.distributed import start_processes
from latentdiff.train.log import Tracker, environment, write_environment
from latentdiff.train.loop import OptimizerStep, Step, training_loop
from latentdiff.train.optimizer import learning_rate, never_at_peak
from latentdiff.train.output import CHECKPOINTS, check_output, is_started, open_output
from latentdiff.train.rendezvous import was_restarted

Config = TypeVar("Config", bound=RunConfig)
Batch = TypeVar("Batch")


class Run(Generic[Config]):
    """The processes of a run and what they share.

    Raises: UserError: a package is missing, the launch or the output folder does not suit, or there
        is nothing to go on from.
    Attributes:
        config: the checked configuration.
        accelerator: the processes.
        resumes: whether the run goes on from a checkpoint.
        shape: how the global batch is cut up.
        notes: what to say when the log is open.
        state, first_step, seconds: from `load_state` on: what is saved; steps made, time spent.
        tracker: from `open_log` on.
    """

    state: TrainingState
    tracker: Tracker
    first_step: int
    seconds: float

    def __init__(self, config: Config, resume: bool, shards: bool = False) -> None:
        check_extras(config)
        self.config, self.output, loop = config, Path(config.output), config.loop
        self.accelerator = start_processes(loop.mixed_precision, shards=shards)
        self.resumes = resume or (was_restarted() and is_started(self.output))
        check_output(self.output, self.resumes)
        before = stored_facts(self.output / CHECKPOINTS) if self.resumes else None
        self.shape, self.notes = batch_shape(config, self.accelerator, before)
        self.notes += check_steps_left(before, loop.max_steps)
        self._planned = planned_steps(before, config)
        self.notes += never_at_peak(config.optimizer, loop.max_steps)
        self.notes += on_the_example(config.data)
        self._lock: IO[str] | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.accelerator.is_main_process

    def open_output(self) -> None:
        """Make the output folder and keep other runs out of it. Raises: UserError."""
        self.accelerator.wait_for_everyone()  # all have looked before one writes
        if self.writes:
            self._lock = open_output(self.output)

    def order(self, indices: Sequence[int]) -> Order:
        """Which image comes when."""
        return Order(indices, self.config.loop.seed, lambda seed, epoch: seed * 7919 + epoch)

    def generator(self, step: int) -> torch.Generator:
        """What is random about the images of a step, all processes' together."""
        return torch.Generator().manual_seed(self.config.loop.seed * 1_000_003 + step)

    def optimizer_step(self, model: nn.Module, optimizer: Any) -> OptimizerStep:
        """The optimizer step of a model at the configured rate and clipping.

        Args:    model, optimizer: as `accelerator.prepare` returned them.
        """
        config = self.config
        return OptimizerStep(
            self.accelerator,
            model,
            optimizer,
            lambda step: learning_rate(
                step, config.optimizer, config.loop.max_steps, self._planned
            ),
            config.optimizer.clip_norm,
            self.shape.accumulation,
        )

    def load_state(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        facts: dict[str, Any],
        averages: Mapping[str, Tensor] | None = None,
        whole: bool = True,
    ) -> None:
        """Say what checkpoints consist of (see `TrainingState`), and load one to go on from.

        Args:    facts: what decides the numbers besides the configuration.
        """
        config, planned = self.config, self._planned
        extended = {} if planned is None else {"loop.max_steps": planned}
        self.state = TrainingState(
            models,
            optimizers,
            self.accelerator,
            self.output / CHECKPOINTS,
            config.loop.keep_last,
            config.loop.keep_every,
            {**deciding_facts(config), **extended, "images per step": self.shape.total, **facts},
            averages or {},
            whole,
            defaults=default_facts(config),
        )
        self.first_step, self.seconds = self.state.resume() if self.resumes else (0, 0.0)

    def open_log(self) -> None:
        """Record what runs, and where; open the log and write the notes."""
        if self.writes:
            save_config(self.config)
            write_environment(self.output, environment(self.accelerator))
        loop, about = self.config.loop, to_dict(self.config)
        self.tracker = Tracker(self.output, self.first_step, loop, self.writes, about)
        for note in self.notes:
            self.tracker.say(note)

    def loop(
        self,
        optimizer_step: OptimizerStep,
        make_batch: Callable[[int, int], Batch],
        **more: Any,
    ) -> Iterator[tuple[Step, Batch]]:
        """The steps that are left, with their batches: see `training_loop`, which takes `more`."""
        return training_loop(
            optimizer_step,
            make_batch,
            self.shape,
            self.config.loop,
            self.tracker,
            self.state.save,
            self.first_step,
            self.seconds,
            **more,
        )

    def end(self) -> None:
        """Wait for the other processes and give up the output folder."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if self._lock is not None:
            self._lock.close()


def check_steps_left(before: dict[str, Any] | None, max_steps: int) -> list[str]:
    """Say that a run to go on with has no steps left, where that is so.

    Args:    before: manifest of the checkpoint to go on from.
    Raises:  UserError: it has more steps than the run should have.
    """
    done = 0 if before is None else int(before["step"])
    if done > max_steps:
        raise UserError(
            f"--resume: the run has made {done} steps, and loop.max_steps={max_steps} is less. Set "
            f"loop.max_steps to {done} or more, or train {max_steps} steps in another output "
            "folder."
        )
    return [
        f"note: all loop.max_steps={max_steps} steps have been made before; nothing is trained, "
        "and the result is written again."
    ] * (done == max_steps)


def planned_steps(before: dict[str, Any] | None, config: RunConfig) -> int | None:
    """Where the rate of a run to go on with was to reach 0, if that is before loop.max_steps.

    Raises:  UserError: it is, and the configuration does not say how the rate goes on.
    """
    planned = None if before is None else before["facts"].get("loop.max_steps")
    optimizer, steps = config.optimizer, config.loop.max_steps
    if planned is None or planned >= steps or optimizer.decay == "constant":
        return None
    if optimizer.extend is None:
        raise UserError(
            f"--resume: the learning rate of this run falls to 0 at step {planned}, and "
            f"loop.max_steps={steps} is more. Say how it goes on: optimizer.extend=restart "
            "(warm-up and cosine again over the added steps), hold (stay at optimizer.lr) or decay "
            f"(the cosine of a run of {steps} steps)."
        )
    return int(planned)


def on_the_example(data: DataConfig) -> list[str]:
    """Say that nobody named a data set."""
    return [f"note: data.path is not given; this trains on {EXAMPLE}."] * (data.path is None)


def batch_shape(
    config: RunConfig, accelerator: Any, before: dict[str, Any] | None
) -> tuple[BatchShape, list[str]]:
    """How the global batch is cut up in this launch, and a note if that is not as configured.

    Args:    before: manifest of the checkpoint to go on from. When another number of processes
             wrote it, the images per step stay as many as they were.
    """
    loop, count = config.loop, accelerator.num_processes
    shape = BatchShape(
        loop.batch_size, loop.gradient_accumulation, count, accelerator.process_index
    )
    if before is None or before["processes"] == count:
        return shape, []
    kept = rebalance(shape, before["facts"]["images per step"])
    if kept == shape:
        return shape, []
    return kept, [
        f"note: {count} processes go on where {before['processes']} were; a step stays "
        f"{kept.total} images with loop.batch_size={kept.per_process} and "
        f"loop.gradient_accumulation={kept.accumulation}."
    ]


def check_extras(config: RunConfig) -> None:
    """Raises: UserError: a setting needs a package that is not there, or does not work here."""
    wandb = config.loop.wandb
    needed = [
        ("bitsandbytes", "8bit", "optimizer.kind=adamw8bit", "optimizer.kind=adamw"),
        ("wandb", "wandb", f"loop.wandb={wandb}", "loop.wandb=null"),
        ("peft", "lora", "finetune.kind=lora", "finetune.kind=full"),
    ]
    is_lora = isinstance(config, TrainConfig) and config.finetune.kind == "lora"
    set_here = (config.optimizer.kind == "adamw8bit", wandb is not None, is_lora)
    for is_set, (package, extra, given, instead) in zip(set_here, needed, strict=True):
        try:
            if is_set:
                importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"{given} needs {package}, which cannot be imported ({error}). Install it with "
                f"`pip install 'latentdiff[{extra}]'`, or set {instead}."
            ) from error


def save_config(config: RunConfig) -> None:
    """Write the resolved configuration to OUTPUT/config.yaml."""
    resolved = to_dict(config)
    if isinstance(config, TrainConfig) and config.model.pretrained is not None:
        # its own configuration says what the U-Net is
        del resolved["model"]["unet"]
    write_text(Path(config.output) / "config.yaml", to_yaml(resolved))
