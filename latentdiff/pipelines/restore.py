"""Tasks that are given a measurement of an image: its grey, a smaller, blurred or noisy copy.

Each is a `Task` of the one core. At every step its denoiser is corrected by the measurement
(`diffusion.guidance.measurement`), and its result is brought to agree with it to 8 bit. An image
larger than the training's is sampled in tiles (`diffusion.guidance.tiled`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.colour import to_lab, with_lightness
from latentdiff.diffusion.guidance.measurement import agree, ddnm
from latentdiff.diffusion.guidance.tiled import tiled
from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.operators import Blur, Downsample, Grey, Jpeg, Operator
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.diffusion.samplers import custom_grid
from latentdiff.errors import UserError, choice_error
from latentdiff.pipelines.call import stream_task
from latentdiff.pipelines.edit import own_images, prompts_of, size_of
from latentdiff.pipelines.image_inputs import GivenImages, ImageInput, read_images
from latentdiff.pipelines.inputs import (
    FINITE,
    check_counts,
    check_pixels,
    check_share,
    is_number,
    prompt_list,
)
from latentdiff.pipelines.masks import padded
from latentdiff.pipelines.settings import recorded
from latentdiff.pipelines.task import DEFAULT_STEPS, Batch, Events, SamplingOptions, Task

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

Kind = Literal["denoise", "deblur", "jpeg"]
#: In units of [−1, 1]: 1/255 of the range, and the deviation of what rounding to 8 bit does.
LEVEL = 2 / 255
ROUNDING = LEVEL / 12**0.5


@dataclass(frozen=True)
class Measurement:
    """What is known of images, and what is begun from."""

    operator: Operator
    y: Tensor
    """A x + noise · ε, (N, …)."""
    noise: float
    start: Tensor
    """Images (N, 3, H, W) in [−1, 1] somewhat like what is looked for."""


@recorded
def colorize(
    pipeline: LatentDiffusionPipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    *,
    strength: float = 0.7,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Give grey images colours; the CIELAB lightness of each pixel stays.

    Colours are coarser than lightness to the eye, so an image larger than those of the training is
    coloured at their size, as a whole, and its colours are enlarged.

    Args:    image: see `image_to_image`; only its lightness counts.
             prompt: what it shows, one text or one for each image; colours may be named.
             strength: 0 … 1, the share of the steps that is run; more gives brighter colours, and
             patches that follow no object.
    Returns: images of the size given.
    """
    inputs = read_images(image)
    lightness = to_lab(inputs.rgb / 2 + 0.5)[:, :1]
    grey = with_lightness(torch.zeros_like(inputs.rgb), lightness).float() * 2 - 1

    def finish(images: Tensor, own: list[int]) -> Tensor:
        unit = F.interpolate(images / 2 + 0.5, inputs.size, mode="bicubic").clamp(0, 1)
        return with_lightness(unit, lightness[own].to(images.device)).float() * 2 - 1

    start = _no_larger(grey, pipeline.default_size)
    known = Measurement(Grey(), Grey().apply(start), 0, start)
    return _measured(pipeline, prompt, inputs, known, strength, finish, options)


@recorded
def upscale(
    pipeline: LatentDiffusionPipeline,
    image: ImageInput,
    scale: float = 2,
    prompt: str | Sequence[str] = "",
    *,
    strength: float = 0.5,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Enlarge images; the mean over the area of each of their pixels stays, to 1/255.

    Args:    image, prompt: see `colorize`.
             scale: above 1; sides become the nearest whole numbers. Where it is not a whole
             number, sharp edges may keep the means from being met that closely.
             strength: 0 … 1, the share of the steps that is run; more invents more.
    """
    if not is_number(scale, most=FINITE) or not scale > 1:
        raise UserError(f"scale must be a number above 1, such as 2; got {scale!r:.80}.")
    inputs = read_images(image)
    height, width = (round(min(side * scale, FINITE)) for side in inputs.size)
    check_pixels(height, width, "the enlarged size")
    larger = GivenImages(F.interpolate(inputs.given, (height, width), mode="bicubic").clamp(-1, 1))
    operator = Downsample((height, width), inputs.size)
    start = F.interpolate(inputs.rgb, (height, width), mode="bicubic").clamp(-1, 1)
    known = Measurement(operator, inputs.rgb, 0, start)
    finish = _agreeing(known, inputs)
    return _measured(pipeline, prompt, larger, known, strength, finish, options)


@recorded
def restore(
    pipeline: LatentDiffusionPipeline,
    image: ImageInput,
    kind: Kind = "denoise",
    prompt: str | Sequence[str] = "",
    *,
    noise: float = 0.1,
    blur: float = 1.5,
    quality: int = 30,
    strength: float = 0.5,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Take noise, blur or the traces of JPEG from images.

    Args:    image, prompt: see `colorize`.
             kind: denoise: what is taken off has the deviation `noise` to 10 %, see `denoise`.
             deblur: the result, blurred, is the input to 1/255.
             jpeg: the result, compressed, has the coefficients of the input.
             noise: its deviation, of colours in 0 … 1.  blur: the Gaussian's, in pixels.
             quality: 1 … 100, what the file was written with.
             strength: of deblur and jpeg, see `upscale`.
    Returns: images of the size given.
    """
    if kind not in get_args(Kind):
        raise choice_error("kind", kind, get_args(Kind))
    checks = (("noise", noise, 0.004, 1.0), ("blur", blur, 0.1, 20.0), ("quality", quality, 1, 100))
    for name, value, low, high in checks:
        if not is_number(value, type(high) | int) or not low <= value <= high:
            kind_of = "whole number" if isinstance(high, int) else "number"
            raise UserError(f"{name} must be a {kind_of} in {low} … {high}; got {value!r:.80}.")
    check_share("strength", strength)
    inputs = read_images(image)
    if kind == "denoise":
        return _denoised(pipeline, prompt, inputs, 2 * noise, options)
    if kind == "deblur":
        known = Measurement(Blur(inputs.size, blur), inputs.rgb, ROUNDING, inputs.rgb)
    else:
        whole = padded(inputs.rgb, Jpeg.MULTIPLE)
        jpeg = Jpeg(size_of(whole), quality)
        known = Measurement(jpeg, jpeg.measure(whole), Jpeg.NOISE, whole)
    finish = _agreeing(known, inputs)
    return _measured(pipeline, prompt, inputs, known, strength, finish, options)


def _no_larger(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images reduced until they fit into a size, in their own shape, if they do not."""
    height, width = size_of(images)
    scale = min(size[0] / height, size[1] / width)
    if scale >= 1:
        return images
    smaller = max(1, round(height * scale)), max(1, round(width * scale))
    return F.interpolate(images, smaller, mode="bicubic", antialias=True).clamp(-1, 1)


def _agreeing(known: Measurement, inputs: GivenImages) -> Callable[[Tensor, list[int]], Tensor]:
    """Brings images to agree with their measurement, also after they are rounded to 8 bit."""
    tolerance = 0.45 if isinstance(known.operator, Jpeg) else LEVEL / 4

    def finish(images: Tensor, own: list[int]) -> Tensor:
        images = _grey_as(inputs.rgb[own].to(images.device), images)
        return agree(images, known.operator, known.y[own].to(images.device), tolerance)

    return finish


def _measured(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    inputs: GivenImages,
    known: Measurement,
    strength: float,
    finish: Callable[[Tensor, list[int]], Tensor],
    options: SamplingOptions,
) -> Events:
    """Sample images of which a measurement is known.

    Args:    images: their size and opacity.
             finish: images (B, 3, H, W) and the numbers of their measurements → the result.
    """
    check_share("strength", strength)
    vae, device, (height, width) = pipeline.autoencoder, pipeline.device, size_of(known.start)
    canvas = padded(known.start, vae.downscale)

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents)[..., :height, :width]

    def encode(images: Tensor) -> Tensor:
        return vae.encode(padded(images.clamp(-1, 1), vae.downscale))

    def start(batch: Batch) -> Tensor:
        return vae.encode(canvas[own_images(batch, len(canvas))].to(device))

    def wrap(denoiser: Denoiser, batch: Batch) -> Denoiser:
        y = known.y[own_images(batch, len(canvas))].to(device)
        return ddnm(
            _tiled(pipeline, denoiser),
            pipeline.schedule,
            known.operator,
            y,
            known.noise,
            decode=decode,
            encode=encode,
        )

    def finished(images: Tensor, batch: Batch) -> Tensor:
        own = own_images(batch, len(canvas))
        return _as_given(finish(images[..., :height, :width], own), inputs, own)

    task = Task(
        size_of(canvas), start, strength, wrap, _all_masked(pipeline, canvas), finish=finished
    )
    prompts = prompts_of(prompt, inputs)
    return stream_task(pipeline, prompts, task, **_unguided(prompts, options))


@torch.no_grad()
def _denoised(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    inputs: GivenImages,
    noise: float,
    options: SamplingOptions,
) -> Events:
    """Take noise off with the sampler itself: noisy latents are an x_t.

    An image with noise has latents of about x_0 + s ε. At the timestep where σ_t/α_t = s, α_t times
    them is what q(x_t | x_0) draws, and sampling goes on from there. What as much noise again does
    to an image's latents is taken for its s; or `timesteps` begin where they do.
    """
    prompts, vae, schedule = prompts_of(prompt, inputs), pipeline.autoencoder, pipeline.schedule
    steps = options.get("num_inference_steps", DEFAULT_STEPS)
    copies = options.get("num_images_per_prompt", 1)
    check_counts(num_inference_steps=steps, num_images_per_prompt=copies)
    canvas = padded(inputs.rgb, vae.downscale)

    def encode(images: Tensor) -> Tensor:
        return torch.cat([vae.encode(one[None].to(pipeline.device)).cpu() for one in images])

    def grid_of(level: float) -> Sequence[float]:
        most = float(schedule.noise_ratio(schedule.last_timestep))
        t = max(1.0, schedule.timestep_at(min(level, most)))
        count = max(1, math.ceil(steps * t / schedule.num_train_timesteps))
        return [t * (1 - k / count) for k in range(count)]

    latents, given = encode(canvas), options.get("timesteps")
    if given is None:
        again = encode(canvas + noise * batch_noise([0], canvas.shape[1:]))
        grids = [grid_of(float(one.std())) for one in again - latents]
    else:
        grids = [given] * len(canvas)
    alphas = [float(schedule.alpha(custom_grid(schedule, one)[0])) for one in grids]
    noisy = torch.tensor(alphas)[:, None, None, None] * latents
    own = [k % len(canvas) for k in range(len(prompts))]

    def finish(images: Tensor, batch: Batch) -> Tensor:
        own, (height, width) = own_images(batch, len(canvas)), inputs.size
        y = inputs.rgb[own].to(images.device)
        images = _grey_as(y, images[..., :height, :width])
        return _as_given(_with_residual(images, y, noise), inputs, own)

    def wrap(denoiser: Denoiser, batch: Batch) -> Denoiser:
        return _tiled(pipeline, denoiser)

    extra = _all_masked(pipeline, canvas)
    timesteps = [grids[k] for k in own] if given is None else ()
    task = Task(size_of(canvas), timesteps=timesteps, wrap=wrap, extra=extra, finish=finish)
    x = noisy[own].repeat_interleave(copies, 0)
    return stream_task(pipeline, prompts, task, latents=x, **_unguided(prompts, options))


def _tiled(pipeline: LatentDiffusionPipeline, denoiser: Denoiser) -> Denoiser:
    """A denoiser whose network sees no more at once than in its training."""
    height, width = (side // pipeline.autoencoder.downscale for side in pipeline.default_size)
    return tiled(denoiser, (height, width))


def _all_masked(
    pipeline: LatentDiffusionPipeline, canvas: Tensor
) -> Callable[[Batch], Tensor] | None:
    """Of a U-Net that inpaints the channels beside x_t, for a tile with everything masked."""
    if not pipeline.unet.config.inpaints:
        return None
    sides = zip(size_of(canvas), pipeline.default_size, strict=True)
    height, width = (min(pair) for pair in sides)
    return lambda _: pipeline.autoencoder.all_masked((height, width))


def _with_residual(images: Tensor, y: Tensor, noise: float) -> Tensor:
    """Images with y − x made larger or smaller until its deviation is `noise`, to 5 %.

    Where y is black or white the noise was cut off; these pixels do not count.
    """
    residual = y - images
    inside = (y.abs() < 1).float()
    squares = (residual.square() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    deviation = squares.sqrt()[:, None, None, None]
    wanted = deviation.clamp(0.95 * noise, 1.05 * noise)
    return (y - residual * wanted / deviation.clamp(min=1e-3 * noise)).clamp(-1, 1)


def _grey_as(given: Tensor, images: Tensor) -> Tensor:
    """Images without colours where the given ones (B, 3, …) have none."""
    is_grey = (given == given[:, :1]).flatten(1).all(1)[:, None, None, None]
    return torch.where(is_grey, Grey().apply(images), images)


def _as_given(images: Tensor, inputs: GivenImages, own: list[int]) -> Tensor:
    """Images over white (B, 3, H, W) at the size that was given, with the opacity if there was."""
    height, width = inputs.size
    images = images[..., :height, :width]
    if inputs.given.shape[1] == 3:
        return images
    clear = inputs.clear[own].to(images.device)
    colours = ((images - clear) / (1 - clear).clamp(min=1 / 255)).clamp(-1, 1)
    return torch.cat([colours, 1 - 2 * clear], 1)


def _unguided(prompts: Sequence[str], options: SamplingOptions) -> SamplingOptions:
    """Options with guidance off where no prompt and no negative prompt says anything."""
    negatives = prompt_list(options.get("negative_prompt") or "", "negative_prompt")
    if any(prompts) or any(negatives) or "guidance_scale" in options:
        return options
    return {**options, "guidance_scale": 1.0}
