"""Validation of a model in training: its loss on fixed draws, and images of fixed prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.objective import ObjectiveConfig, draw, per_sample_loss
from latentdiff.diffusion.samplers import timestep_grid, warn_of_late_start
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.files import atomic_file
from latentdiff.images import grid, to_output
from latentdiff.models.finite import NotFiniteError
from latentdiff.sampling import Network, SamplingPlan, build_denoiser, sample_latents
from latentdiff.train.batches import ContextCache
from latentdiff.train.config import TrainConfig
from latentdiff.train.distributed import is_sharded
from latentdiff.train.ema import Ema
from latentdiff.train.latents import Latents
from latentdiff.train.log import Tracker
from latentdiff.train.order import by_bucket
from latentdiff.train.output import SAMPLES

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.folder import Components

#: Moves the draws of validation away from those of training with the same seed.
_VALIDATION_STREAM = 0x56414C


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


@torch.no_grad()
def validation_loss(
    unet: nn.Module,
    autoencoder: Any,
    data: Any,
    indices: Sequence[int],
    context: Callable[[Sequence[str]], Tensor],
    schedule: NoiseSchedule,
    objective: ObjectiveConfig,
    samples: int,
    seed: int = 0,
    batch_size: int = 32,
) -> ValidationLoss:
    """Loss over fixed draws (image, timestep, noise), with the caption always given.

    Args:
        indices: the held-out images in `data`; sample i is image i mod their number.
        context: captions → text states.
        samples: number of draws.
    """
    objective = dataclasses.replace(objective, condition_dropout=0.0)
    device = next(unet.parameters()).device
    total, losses, quarters = 0.0, list[Tensor](), list[Tensor]()
    for numbers in _batches(data, indices, samples, batch_size):
        rows = [indices[n % len(indices)] for n in numbers]
        stored, mask = data.read(rows, numbers)
        shape = (stored.shape[1] // 2, *stored.shape[2:])
        random = draw(seed ^ _VALIDATION_STREAM, numbers, shape, objective, schedule)
        moments = stored.float().to(device)
        x_0 = autoencoder.latents_from_moments(moments, random.posterior_eps.to(device))
        states = context([data.captions(row)[0] for row in rows]).to(device)
        weight = None if mask is None else mask.float().to(device)
        loss = per_sample_loss(unet, x_0, states, random, schedule, objective, weight)
        total += float(loss.double().sum())
        losses.append(loss.double().cpu())
        quarters.append((4 * random.t / schedule.num_train_timesteps).long().clamp(max=3))
    return ValidationLoss(total / samples, by_quartile(torch.cat(losses), torch.cat(quarters)))


def by_quartile(losses: Tensor, quarters: Tensor) -> list[float | None]:
    """Mean of the losses of each quarter 0 … 3 of the timesteps; None where there is none."""
    parts = [losses[quarters == quarter] for quarter in range(4)]
    return [float(part.mean()) if len(part) else None for part in parts]


def _batches(
    data: Any, indices: Sequence[int], samples: int, batch_size: int
) -> Iterator[list[int]]:
    """Sample numbers in batches, each of images of one shape."""
    for group in by_bucket(data, [indices[n % len(indices)] for n in range(samples)]):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


@torch.no_grad()
def sample_images(
    network: Network,
    autoencoder: Any,
    context: Callable[[Sequence[str]], Tensor],
    prompts: Sequence[str],
    latent_shape: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """DDIM images of the prompts; image i starts from the noise of seed + i.

    Args:    context: captions → text states.  latent_shape: (C, h, w).
    Returns: (len(prompts), 3, H, W) in [−1, 1] on the CPU.
    Raises:  NotFiniteError: U-Net or autoencoder gave NaN or infinity.
    """
    device = next(network.unet.parameters()).device
    plan = SamplingPlan(timestep_grid(network.schedule, steps))
    warn_of_late_start(network.schedule, plan.timesteps)
    images = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        states, empty = context(part).to(device), context([""]).to(device)
        denoiser = build_denoiser(network, states, empty, guidance)
        x_T = batch_noise(seeds, latent_shape)
        latents = sample_latents(network, denoiser, x_T, seeds, plan)
        images.append(autoencoder.decode(latents).cpu())
    return torch.cat(images)


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
    ) -> None:
        self._config, self._parts, self._latents = config, components, latents
        self._model = components.unet if model is None else model
        self._context, self._ema, self._tracker = context, ema, tracker
        self._accelerator = accelerator
        self._schedule = NoiseSchedule(config.schedule)
        self._prompts = config.validation.prompts or self._captions(config.validation.pictures)

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
                self._loss(step)
                self._grid(step, "")
            if self._config.validation.raw:
                with self._accelerator.autocast():
                    self._grid(step, "-raw")
            unet.train(was_training)
        self._accelerator.wait_for_everyone()

    def _loss(self, step: int) -> None:
        if not self._latents.held_out:
            return
        loss = validation_loss(
            self._model,
            self._parts.autoencoder,
            self._latents.data,
            self._latents.held_out,
            self._context,
            self._schedule,
            self._config.objective,
            self._config.validation.samples,
            self._config.loop.seed,
        )
        self._tracker.write([{"step": step, **loss.row()}])
        self._tracker.say(f"step {step}: validation loss {loss.mean:.4f}")

    def _grid(self, step: int, kind: str) -> None:
        if not self._prompts:
            return
        validation, (channels, height, width) = self._config.validation, self._latents.data.shape
        # A sharded U-Net has its weights only when called. Guidance is in the type of autocast.
        network = Network(
            self._model,
            self._schedule,
            self._config.objective.prediction,
            project=not is_sharded(self._model),
            upcast=False,
        )
        try:
            images = sample_images(
                network,
                self._parts.autoencoder,
                self._context,
                self._prompts,
                (channels // 2, height, width),
                steps=validation.steps,
                guidance=validation.guidance,
                seed=validation.seed,
            )
        except NotFiniteError as error:  # whether the run goes on is decided by its steps
            self._tracker.say(f"step {step}: no images: {error}")
            return
        image = grid(to_output(images, "pil"), border=2)
        if self._accelerator.is_main_process:
            file = Path(self._config.output) / SAMPLES / f"step-{step:08d}{kind}.png"
            with self._tracker.going_on(str(file)):
                file.parent.mkdir(exist_ok=True)
                with atomic_file(file) as new:
                    image.save(new)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        self._tracker.image(f"samples{kind}", step, pixels)

    def _captions(self, count: int) -> Sequence[str]:
        rows = self._latents.held_out or self._latents.train
        chosen = rows[:: max(1, len(rows) // max(1, count))][:count]
        return [self._latents.data.captions(row)[0] for row in chosen]
