"""Validation of a model in training: its loss on fixed draws, and images of fixed prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.objective import draw, per_sample_loss
from latentdiff.diffusion.samplers import timestep_grid, warn_of_late_start
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.files import atomic_file
from latentdiff.images import grid, to_output
from latentdiff.models.finite import NotFiniteError
from latentdiff.models.unet import with_extra
from latentdiff.sampling import Network, SamplingPlan, build_denoiser, sample_latents
from latentdiff.train.batches import ContextCache, by_bucket, plainly
from latentdiff.train.config import TrainConfig
from latentdiff.train.distributed import is_sharded
from latentdiff.train.ema import Ema
from latentdiff.train.log import Tracker
from latentdiff.train.output import SAMPLES
from latentdiff.train.parts import Latents

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.folder import Components

#: Moves the draws of validation away from those of training with the same seed.
_VALIDATION_STREAM = 0x56414C
#: Images at a time in the loss and in the grid.
LOSS_BATCH, GRID_BATCH = 32, 16


class ValidationLoss(NamedTuple):
    """Loss on the fixed draws of validation."""

    mean: float
    """Over all draws."""
    quartiles: list[float | None]
    """Over the draws of each quarter of the timesteps, the least noise first; None: no draw."""

    def row(self) -> dict[str, float]:
        """As columns of the metrics: validation_loss, validation_loss_q1 … q4."""
        quarters = {f"validation_loss_q{n}": q for n, q in enumerate(self.quartiles, start=1)}
        return {"validation_loss": self.mean} | {k: q for k, q in quarters.items() if q is not None}


def by_quartile(losses: Tensor, quarters: Tensor) -> list[float | None]:
    """Mean of the losses of each quarter 0 … 3 of the timesteps; None where there is none."""
    parts = [losses[quarters == quarter] for quarter in range(4)]
    return [float(part.mean()) if len(part) else None for part in parts]


class Validator:
    """Writes OUTPUT/samples/step-N.png (averaged weights), step-N-raw.png (the newest) and the
    validation loss on the main process.

    The others wait, or compute along where the U-Net is sharded: a pass needs all shards.
    """

    def __init__(
        self,
        config: TrainConfig,
        components: Components,
        latents: Latents,
        context: ContextCache,
        ema: Ema,
        tracker: Tracker,
        accelerator: Accelerator,
        model: Any = None,
        extra: Any = None,
    ) -> None:
        self._config, self._parts, self._latents = config, components, latents
        self._model = components.unet if model is None else model
        self._device = next(self._model.parameters()).device
        self._context, self._ema, self._tracker, self._extra = context, ema, tracker, extra
        self._accelerator = accelerator
        self._schedule = NoiseSchedule(config.schedule)
        self._prompts = config.validation.prompts or self._captions(config.validation.images)

    def due(self, step: int) -> bool:
        """Whether to validate after so many steps (the end comes by itself)."""
        validation = self._config.validation
        if step == 0:
            return validation.at_start
        return bool(validation.every) and step % validation.every == 0

    def __call__(self, step: int) -> None:
        """Validate the averaged weights; the other processes wait."""
        unet = self._model
        if self._accelerator.is_main_process or is_sharded(unet):
            was_training = unet.training
            with self._ema.applied(), self._accelerator.autocast():
                unet.eval()
                self._log_loss(step)
                self._save_grid(step, "")
            if self._config.validation.raw and step:  # before the first both are the same
                with self._accelerator.autocast():
                    self._save_grid(step, "-raw")
            unet.train(was_training)
        self._accelerator.wait_for_everyone()

    def _log_loss(self, step: int) -> None:
        if not self._latents.held_out:
            return
        loss = self._loss()
        self._tracker.write([{"step": step, **loss.row()}])
        self._tracker.say(f"step {step}: validation loss {loss.mean:.4f}")

    @torch.no_grad()
    def _loss(self) -> ValidationLoss:
        """Over fixed draws (image, timestep, noise), with the caption always given."""
        config, total, losses, quarters = self._config, 0.0, list[Tensor](), list[Tensor]()
        objective = dataclasses.replace(config.objective, condition_dropout=0.0)
        data, seed = self._latents.data, config.loop.seed ^ _VALIDATION_STREAM
        for numbers, rows in self._held_out_batches():
            stored, mask = data.read(rows, numbers)
            shape = (stored.shape[1] // 2, *stored.shape[2:])
            random = draw(seed, numbers, shape, objective, self._schedule)
            x_0 = self._parts.autoencoder.latents_from_moments(
                stored.float().to(self._device), random.posterior_eps.to(self._device)
            )
            captions = [plainly(data.captions(row), config.captions) for row in rows]
            states = self._context(captions).to(self._device)
            weight = None if mask is None else mask.float().to(self._device)
            extra = None if self._extra is None else self._extra(data, rows, numbers)
            model = with_extra(self._model, extra)
            loss = per_sample_loss(model, x_0, states, random, self._schedule, objective, weight)
            total += float(loss.double().sum())
            losses.append(loss.double().cpu())
            quarter = 4 * random.t / self._schedule.num_train_timesteps
            quarters.append(quarter.long().clamp(max=3))
        mean = total / config.validation.samples
        return ValidationLoss(mean, by_quartile(torch.cat(losses), torch.cat(quarters)))

    def _held_out_batches(self) -> Iterator[tuple[list[int], list[int]]]:
        """(sample numbers, their images) in batches of one shape; sample i is image i mod n."""
        held_out = self._latents.held_out
        rows = [held_out[n % len(held_out)] for n in range(self._config.validation.samples)]
        for group in by_bucket(self._latents.data, rows):
            for start in range(0, len(group), LOSS_BATCH):
                numbers = group[start : start + LOSS_BATCH]
                yield numbers, [rows[n] for n in numbers]

    def _save_grid(self, step: int, kind: str) -> None:
        if not self._prompts:
            return
        try:
            images = self._sample()
        except NotFiniteError as error:  # whether the run goes on is decided by its steps
            self._tracker.say(f"step {step}: no images: {error}")
            return
        image = grid(to_output(images, "pil"), border=2)
        if self._accelerator.is_main_process:
            file = Path(self._config.output) / SAMPLES / f"step-{step:08d}{kind}.png"
            with self._tracker.tolerate_failure(str(file)):
                file.parent.mkdir(exist_ok=True)
                with atomic_file(file) as new:
                    image.save(new)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        self._tracker.image(f"samples{kind}", step, pixels)

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """DDIM images of the prompts, (N, 3, H, W) in [−1, 1]; image i has the seed + i.

        An inpainting U-Net draws them with everything masked.

        Raises: NotFiniteError: U-Net or autoencoder gave NaN or infinity.
        """
        options, (channels, height, width) = self._config.validation, self._latents.data.shape
        autoencoder = self._parts.autoencoder
        size = height * autoencoder.downscale, width * autoencoder.downscale
        # A sharded U-Net has its weights only when called.
        network = Network(
            self._model,
            self._schedule,
            self._config.objective.prediction,
            project=not is_sharded(self._model),
            extra=None if self._extra is None else autoencoder.all_masked(size),
        )
        plan = SamplingPlan(timestep_grid(self._schedule, options.steps))
        warn_of_late_start(self._schedule, plan.timesteps)
        images = []
        for start in range(0, len(self._prompts), GRID_BATCH):
            part = self._prompts[start : start + GRID_BATCH]
            seeds = range(options.seed + start, options.seed + start + len(part))
            states, empty = (self._context(texts).to(self._device) for texts in (part, [""]))
            denoiser = build_denoiser(network, states, empty, options.guidance)
            x_T = batch_noise(seeds, (channels // 2, height, width))
            latents = sample_latents(network, denoiser, x_T, seeds, plan)
            images.append(autoencoder.decode(latents).cpu())
        return torch.cat(images)

    def _captions(self, count: int) -> Sequence[str]:
        rows = list(dict.fromkeys(self._latents.held_out or self._latents.train))
        chosen = rows[:: max(1, len(rows) // max(1, count))][:count]
        own, data = self._config.captions, self._latents.data
        return [plainly(data.captions(row), own) for row in chosen]
