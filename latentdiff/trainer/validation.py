"""Looking at a model in training: pictures of fixed prompts and seeds, loss on fixed draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.atomic import atomic_file
from latentdiff.diffusion.guidance import guidance_context, guide
from latentdiff.diffusion.noise import batch_noise, step_noise
from latentdiff.diffusion.objective import ObjectiveConfig, draw, per_sample_loss
from latentdiff.diffusion.samplers import as_denoiser, sample, timestep_grid, warn_of_late_start
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.unet import UNet
from latentdiff.trainer.bucket_order import by_bucket
from latentdiff.trainer.sharding import is_sharded

#: Moves the draws of validation away from those of training with the same seed.
_VALIDATION_STREAM = 0x56414C


class HeldOutLoss(NamedTuple):
    """What validation measures."""

    mean: float
    """Over all draws."""
    quartiles: list[float | None]
    """Over the draws of each quarter of the timesteps, the least noise first; None: no draw."""

    def row(self) -> dict[str, float]:
        """As columns of the metrics: validation_loss, validation_loss_q1 … q4."""
        quarters = {f"validation_loss_q{n}": q for n, q in enumerate(self.quartiles, start=1)}
        return {"validation_loss": self.mean} | {k: q for k, q in quarters.items() if q is not None}


@torch.no_grad()
def held_out_loss(
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
) -> HeldOutLoss:
    """Loss over fixed draws (picture, timestep, noise), with the caption always given.

    Args:
        indices: the held-out pictures in `data`; sample i is picture i mod their number.
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
    return HeldOutLoss(total / samples, by_quartile(torch.cat(losses), torch.cat(quarters)))


def by_quartile(losses: Tensor, quarters: Tensor) -> list[float | None]:
    """Mean of the losses of each quarter 0 … 3 of the timesteps; None where there is none."""
    parts = [losses[quarters == quarter] for quarter in range(4)]
    return [float(part.mean()) if len(part) else None for part in parts]


def _batches(
    data: Any, indices: Sequence[int], samples: int, batch_size: int
) -> Iterator[list[int]]:
    """Sample numbers in batches, each of pictures of one shape."""
    for group in by_bucket(data, [indices[n % len(indices)] for n in range(samples)]):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


@torch.no_grad()
def pictures(
    unet: UNet,
    autoencoder: Any,
    context: Callable[[Sequence[str]], Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    prompts: Sequence[str],
    latent_shape: Sequence[int],
    *,
    steps: int = 25,
    guidance: float = 4.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """DDIM pictures of the prompts; picture i starts from the noise of seed + i.

    Returns: (len(prompts), 3, H, W) in [−1, 1] on the CPU.
    """
    device = next(unet.parameters()).device
    grid = timestep_grid(schedule, steps)
    warn_of_late_start(schedule, grid)
    found = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        seeds = range(seed + start, seed + start + len(part))
        states = guidance_context(context(part).to(device), context([""]).to(device), guidance)
        # Keys and values are made once, but a sharded block has its weights only when called.
        once = not is_sharded(unet)
        predict = (
            partial(unet, kv=unet.project_context(states))
            if once
            else partial(unet, context=states)
        )
        denoiser = as_denoiser(guide(predict, guidance), schedule, prediction)
        x_T = batch_noise(seeds, latent_shape).to(device)
        noise = step_noise(seeds, latent_shape, device)
        latents = sample("ddim", denoiser, x_T, schedule, grid, noise)
        found.append(autoencoder.decode(latents).float().clamp(-1, 1).cpu())
    return torch.cat(found)


def picture_grid(images: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Lay pictures (N, 3, H, W) in [−1, 1] out in rows: uint8 (3, H', W')."""
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), 255)
    canvas = canvas.to(torch.uint8)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for i, picture in enumerate(pixels):
        top = gap + (i // columns) * (height + gap)
        left = gap + (i % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas


def write_png(picture: Tensor, path: Path) -> None:
    """Write uint8 (3, H, W)."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(new)
