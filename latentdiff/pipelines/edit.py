"""Tasks that begin from an image: painting it anew, in part or beyond its edges; and from image to
image.

Each is a `Task` of the one core. An image of any size is padded to the autoencoder's multiple by
repeating its edges, and cropped back.

Source: image to image: Meng et al. 2022, arXiv:2108.01073. For inpainting see
        `diffusion.guidance.inpaint`; a U-Net with mask channels is given them as Stable Diffusion's
        (Rombach et al. 2022, section 4.5, arXiv:2112.10752).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.diffusion.guidance.inpaint import inpaint as keep_known
from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.errors import UserError, warn
from latentdiff.models.finite import check_finite
from latentdiff.pipelines.call import stream_task
from latentdiff.pipelines.image_inputs import GivenImages, ImageInput, read_images, read_masks
from latentdiff.pipelines.inputs import (
    check_pixels,
    check_share,
    check_whole,
    for_each,
    prompt_list,
    warn_of_size,
)
from latentdiff.pipelines.masks import (
    composite,
    crop_box,
    in_latents,
    matched,
    padded,
    surrounded,
    widened,
)
from latentdiff.pipelines.settings import recorded
from latentdiff.pipelines.task import Batch, Events, SamplingOptions, Task, stream_of

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

#: The widest blur of a mask, in pixels; the time grows with it.
MAX_BLUR = 256


@recorded
def image_to_image(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    strength: float = 0.8,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Draw images anew from their noised selves.

    Args:    image: one, or one for each prompt, all of one size; see `read_images`. The network
             sees transparency as white; the result has it where the image had it.
             strength: 0 gives the image itself, without a step; 1 begins from pure noise, so that
             nothing of the image is left; between them that share of the steps is run.
    Returns: images of the size given; `.steps` says how many steps were run.
    """
    check_share("strength", strength)
    inputs = read_images(image)
    canvas = padded(inputs.rgb, pipeline.autoencoder.downscale)
    height, width = inputs.size

    def finish(images: Tensor, batch: Batch) -> Tensor:
        given = inputs.given[own_images(batch, len(inputs))].to(images.device)
        if strength == 0:
            return given
        return torch.cat([images[..., :height, :width], given[:, 3:]], dim=1)

    if strength > 0:
        advice = "Reduce the image before, and upscale the result."
        warn_of_size(inputs.size, pipeline.default_size, advice)
    latents = _latents(pipeline, canvas)
    task = Task(size_of(canvas), start=latents, strength=strength, finish=finish)
    return stream_task(pipeline, prompts_of(prompt, inputs), task, **options)


@recorded
def inpaint(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    mask_image: ImageInput | None = None,
    strength: float = 1.0,
    *,
    mask_blur: int = 0,
    padding_mask_crop: int | None = None,
    fill: bool = False,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Paint a part of images anew; every pixel of the rest stays as it is, to the bit.

    Args:    image: see `image_to_image`.
             mask_image: white where to paint, black where to keep, grey: the share of what is
             painted; one, or one for each image; see `read_masks`. None: the images' transparency,
             which is then filled.
             strength: 1 paints from pure noise, less keeps more of what was there; 0 gives the
             image itself.
             mask_blur: in pixels; the mask is first widened by it, see `widened`, so that what
             was masked is painted in full, and nothing changes beyond twice that distance.
             padding_mask_crop: work on the masked area alone, with so many pixels around it,
             enlarged or reduced to the size of the model's training; None: on the whole image.
             fill: below strength 1, begin from the colours around the mask and not from what was
             there.
    """
    check_share("strength", strength)
    check_whole(MAX_BLUR, mask_blur=mask_blur)
    if padding_mask_crop is not None:
        check_whole(padding_mask_crop=padding_mask_crop)
    inputs = read_images(image)
    seen = inputs.rgb
    if mask_image is not None:
        mask = read_masks(mask_image, inputs.size, len(inputs))
    else:
        mask, inputs = inputs.clear, _opaque(inputs, strength)
        if not mask.flatten(1).any(1).all():
            raise UserError(
                "inpaint needs mask_image (--mask), white where to paint, or an image with "
                "transparent parts; this one is opaque."
            )
    if (mask == 1).all():
        warn("the mask is white everywhere, so nothing of the image is kept.")
    if fill:
        seen = surrounded(seen, mask)
    return _paint(
        pipeline, prompt, inputs, seen, mask, strength, mask_blur, padding_mask_crop, options
    )


@recorded
def outpaint(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    image: ImageInput,
    strength: float = 1.0,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    mask_blur: int = 0,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Paint beyond the edges of images, and where they are transparent.

    Args:    left, right, top, bottom: how many pixels to add there.
             image, strength, mask_blur: see `inpaint`; below strength 1 the edges' colours,
             repeated outwards, are what is begun from. Blur goes into the image.
    """
    sides = {"left": left, "right": right, "top": top, "bottom": bottom}
    check_share("strength", strength)
    check_whole(**sides)
    check_whole(MAX_BLUR, mask_blur=mask_blur)
    if not any(sides.values()):
        raise UserError("outpaint needs at least one of left, right, top, bottom above 0.")
    inputs = read_images(image)
    height, width = inputs.size
    check_pixels(height + top + bottom, width + left + right, "the size with what is added")
    margins = (left, right, top, bottom)
    mask = F.pad(inputs.clear, margins, value=1.0)
    larger = GivenImages(F.pad(_opaque(inputs, strength).given, margins, mode="replicate"))
    seen = F.pad(inputs.rgb, margins, mode="replicate")
    return _paint(pipeline, prompt, larger, seen, mask, strength, mask_blur, None, options)


@recorded
def variations(
    pipeline: LatentDiffusionPipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    strength: float = 0.7,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Images like the given ones: `image_to_image` without a prompt, four of each by default."""
    several: SamplingOptions = {"num_images_per_prompt": 4, **options}
    return stream_of(image_to_image)(pipeline, prompt, image, strength, **several)


def _paint(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    inputs: GivenImages,
    seen: Tensor,
    mask: Tensor,
    strength: float,
    blur: int,
    padding: int | None,
    options: SamplingOptions,
) -> Events:
    """Paint where the mask is above 0, and put it over the images with the mask widened.

    Args:    seen: the images as the network sees them, (N, 3, H, W).
    """
    soft = widened(mask, blur)
    region = Region.of(soft, padding, pipeline.default_size)
    if strength > 0:
        advice = "Reduce the image before, or inpaint with padding_mask_crop (--padding-mask-crop)."
        warn_of_size(region.size, pipeline.default_size, advice)
    vae, device = pipeline.autoencoder, pipeline.device
    down = vae.downscale
    canvas = padded(region.cut(seen, "bicubic").clamp(-1, 1), down)
    paint = (padded(region.cut(mask, "area"), down) > 0).float()
    known = _latents(pipeline, canvas)
    extra = _of_each(
        len(canvas), lambda k: vae.encode_masked(canvas[k].to(device), paint[k].to(device))
    )

    def here(batch: Batch) -> Tensor:
        return in_latents(paint[own_images(batch, len(paint))], down).to(pipeline.device)

    def wrap(denoiser: Denoiser, batch: Batch) -> Denoiser:
        own = known(batch)
        noise = batch_noise(batch.seeds, own.shape[1:]).to(own.device)
        return keep_known(denoiser, pipeline.schedule, own, here(batch), noise)

    def settle(latents: Tensor, batch: Batch) -> Tensor:
        """Without the noise of a sampler that ends above the clean image."""
        return torch.where(here(batch) > 0, latents, known(batch))

    def finish(images: Tensor, batch: Batch) -> Tensor:
        own = own_images(batch, len(inputs))
        given = GivenImages(inputs.given[own].to(images.device))
        if strength == 0:
            return given.given
        over = soft[own].to(images.device)
        painted = region.put(images, given.rgb)
        return composite(matched(painted, given.rgb, over, 2 * down), given, over)

    task = Task(size_of(canvas), start=known, strength=strength, finish=finish)
    if pipeline.unet.config.inpaints:
        task = replace(task, extra=extra)
    else:
        task = replace(task, wrap=wrap, settle=settle)
    return stream_task(pipeline, prompts_of(prompt, inputs), task, **options)


@dataclass(frozen=True)
class Region:
    """The part of an image that is worked on, at a size of its own."""

    box: tuple[int, int, int, int]
    """Top, left, bottom, right in the image."""
    size: tuple[int, int]
    """(height, width) that it is worked on at."""

    @classmethod
    def of(cls, mask: Tensor, padding: int | None, shape: tuple[int, int]) -> Region:
        """The whole image; or the masked area with a padding, at about the size `shape`."""
        if padding is None:
            height, width = mask.shape[-2:]
            return cls((0, 0, height, width), (height, width))
        box = top, left, bottom, right = crop_box(mask, padding, shape)
        height, width = bottom - top, right - left
        scale = min(shape[0] / height, shape[1] / width)
        return cls(box, (max(1, round(height * scale)), max(1, round(width * scale))))

    def cut(self, images: Tensor, mode: str) -> Tensor:
        """This part of images (N, C, H, W) at the size that is worked on."""
        top, left, bottom, right = self.box
        return _resized(images[..., top:bottom, left:right], self.size, mode)

    def put(self, painted: Tensor, images: Tensor) -> Tensor:
        """Images with this part from the upper left of `painted`."""
        top, left, bottom, right = self.box
        part = painted[..., : self.size[0], : self.size[1]]
        part = _resized(part, (bottom - top, right - left), "bicubic").clamp(-1, 1)
        whole = images.clone()
        whole[..., top:bottom, left:right] = part
        return whole


def _resized(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if images.shape[-2:] == size:
        return images
    smooth = {"antialias": True} if mode == "bicubic" else {}
    return F.interpolate(images, size=size, mode=mode, **smooth)


def _opaque(inputs: GivenImages, strength: float) -> GivenImages:
    """The colours of images whose transparent part will be painted, if anything will."""
    return inputs if strength == 0 else GivenImages(inputs.given[:, :3])


def _of_each(count: int, compute: Callable[[slice], Tensor]) -> Callable[[Batch], Tensor]:
    """Of each image of a pass what is computed once and alone: the batch does not change it."""
    once = cache(lambda k: compute(slice(k, k + 1)))
    return lambda batch: torch.cat([once(k) for k in own_images(batch, count)])


def _latents(pipeline: LatentDiffusionPipeline, images: Tensor) -> Callable[[Batch], Tensor]:
    """The latents (B, C, h, w) of the images of a pass."""
    vae = pipeline.autoencoder

    def encode(k: slice) -> Tensor:
        latents = vae.encode(images[k].to(pipeline.device))
        check_finite(latents, "the image's latents", "the autoencoder's encoder", vae.module)
        return latents

    return _of_each(len(images), encode)


def own_images(batch: Batch, count: int) -> list[int]:
    """Which of the given images belongs to each of a pass: the one there is, or its prompt's."""
    return [prompt % count for prompt in batch.prompts]


def prompts_of(prompt: str | Sequence[str], inputs: GivenImages) -> list[str]:
    """One prompt for each image, or several for one image."""
    prompts = prompt_list(prompt, "prompt")
    if len(inputs) == 1:
        return prompts
    return for_each(prompts, len(inputs), "prompt", "text", "images")


def size_of(images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return height, width
