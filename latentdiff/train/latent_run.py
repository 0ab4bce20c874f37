"""The parts of a train_latent.py run, put together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.finetune.method import Loss, Method
from latentdiff.finetune.registry import make_method
from latentdiff.train import memory
from latentdiff.train.batches import BatchMaker, ContextCache, LatentBatch, make_order
from latentdiff.train.config import Given, TrainConfig
from latentdiff.train.distributed import on_first, prepare
from latentdiff.train.ema import Ema, PowerEmas, averages
from latentdiff.train.log import MEBI, make_gauges, peak_memory
from latentdiff.train.loop import Step
from latentdiff.train.optimizer import make_optimizer
from latentdiff.train.parts import (
    Latents,
    gathered,
    load_parts,
    long_captions,
    none_held_out,
    open_latents,
    prepare_unet,
)
from latentdiff.train.run import Run
from latentdiff.train.validation import Validator


class LatentRun(Run[TrainConfig]):
    """A run of train_latent.py: a model, a fine-tuning method, latents, averages.

    Attributes:
        autoencoder, schedule: what turns the latents' moments into x_0, and x_0 into x_t.
        method: the fine-tuning method, with the module that is trained.
        model: that module as the processes have it (DDP, FSDP2).
        ema: the average that is validated and exported.  powers: averages to choose from later.
    """

    def __init__(self, given: Given, resume: bool) -> None:
        super().__init__(given.config, resume, shards=True)
        device = self.accelerator.device
        self.components, self.config, notes = load_parts(given)
        self.autoencoder = self.components.autoencoder.to(device)
        self.schedule = NoiseSchedule(self.config.schedule)
        self.latents = open_latents(self.config, self.autoencoder, self.accelerator)
        self.open_output()
        self.method = self._make_method()
        self.optimizer = make_optimizer(self.method.module, self.config.optimizer)
        self.model, self._prepared = prepare(self.accelerator, self.method.module, self.optimizer)
        self.ema = Ema(self.method.module, self.config.loop.ema_decay)
        self.powers = PowerEmas(self.method.module, self.config.power_ema, self.output, self.writes)
        self._load()
        self.make_batch = self._make_batches()
        self.notes = notes + self._notes()
        self._done = self.first_step

    def _make_method(self) -> Method:
        """Put the networks in place and let the method prepare them."""
        prepare_unet(self.components, self.config, self.accelerator)
        self.components.text_encoder.to(self.accelerator.device)
        torch.manual_seed(self.config.loop.seed)
        return make_method(self.components, self.config.finetune)

    def _load(self) -> None:
        self.load_state(
            {"unet": self.method.module},
            {"unet": self.optimizer},
            {**self.latents.facts(), **self.method.facts()},
            averages(self.ema, self.powers),
            whole=not self.method.adds,
        )

    def _make_batches(self) -> BatchMaker:
        config, data = self.config, self.latents.data
        room = config.latents.context_megabytes * 2**20
        self.context = ContextCache(self.method.encode, self.components.text_encoder.device, room)
        order = make_order(data, self.latents.train, config.loop.seed, self.shape.total)
        return BatchMaker(
            data,
            order,
            self.shape,
            self.context,
            config.objective,
            self.schedule,
            self.accelerator.device,
            config.captions,
            self.method.extra,
        )

    def _notes(self) -> list[str]:
        about = [self.method.about()]
        cut_off = long_captions(self.latents, self.components.text_encoder)
        about.append(plan_of(self.config.loop.max_steps, self.shape.total, self.latents))
        return about + none_held_out(self.latents, self.config) + self.notes + cut_off

    def begin(self, loss: Loss) -> None:
        """Find a micro-batch that fits into memory, open the log, validate if that is due.

        Args:    loss: (model, batch) → loss of each sample, as training has it.
        """
        if self.config.loop.probe_memory:
            module = self.method.module

            def trial(count: int) -> Tensor:
                return loss(module, self.make_batch.trial(count)).mean()

            wanted = self.shape.per_process
            self.shape = memory.probe(module, trial, self.optimizer, self.shape, self.accelerator)
            self.make_batch.shape = self.shape
            if self.shape.per_process < wanted:
                self.notes.append(memory.halved_note(wanted, self.shape))
        self.open_log()
        self.validate = Validator(
            self.config,
            self.components,
            self.latents,
            self.context,
            self.ema,
            self.tracker,
            self.accelerator,
            self.method.module,
            self.method.extra,
        )
        self._validate_if_due(self.first_step)

    def steps(self) -> Iterator[tuple[Step, LatentBatch]]:
        """The steps that are left, with their batches."""
        return self.loop(
            self.optimizer_step(self.model, self._prepared),
            self.make_batch,
            gauges=make_gauges(self.components, self.latents, self.accelerator, self.method.adds),
            after_step=self._validate_if_due,
        )

    def update_averages(self, step: int) -> None:
        """Move all averages after the optimizer step `step`; store those that are due."""
        self.ema.update(step)
        with self.tracker.tolerate_failure("a stored average"):
            self.powers.update(step)
        self._done = step + 1

    def _validate_if_due(self, done: int) -> None:
        if self.validate.due(done):
            self.validate(done)

    def finish(self) -> str:
        """Validate, export what was trained, end. Returns: what was written, and how to use it."""
        if not self.validate.due(self._done):
            self.validate(self._done)
        with self.tracker.tolerate_failure("a stored average"):
            self.powers.store(self._done)
        used = peak_memory(self.accelerator.device) / MEBI
        self.tracker.say(f"peak memory: {used:.0f} MB")
        self.tracker.close()
        written = self._export()
        self.end()
        return closing_message(self.config, written, self.method)

    def _export(self) -> list[Path]:
        """Let the method write what was trained, with the averaged weights."""
        dtype = getattr(torch, self.config.export.dtype)
        with self.ema.applied():
            parts = gathered(self.components)
            return on_first(lambda: self.method.export(parts, self.output, dtype)) or []


def plan_of(steps: int, per_step: int, latents: Latents) -> str:
    """How many steps, images and epochs a run has."""
    plan = f"{steps:,} steps of {per_step:,} images"
    if not (count := len(latents.train)):  # of a stream nobody knows
        return plan
    images = len(set(latents.train))
    repeated = f" ({count:,} with repeats)" * (count > images)
    return f"{plan}: {steps * per_step / count:,.1f} epochs of {images:,} images{repeated}"


def closing_message(config: TrainConfig, written: list[Path], method: Method) -> str:
    """Say what a run has written and how to use it, as a shell takes it."""
    base, output = config.model.pretrained, quote(config.output)
    model = "" if not method.adds or base in (None, "embedded") else f"--model {quote(base)} "
    files = "".join(f"\nmodel: {path}" for path in written)
    usage = model + method.usage.replace("{output}", output)
    return f'{files}\nuse it: latentdiff generate "{method.example}" {usage}'
