"""Images → the noise they come from, so that they can be drawn again, or again differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.diffusion.inversion import ddim_inversion
from latentdiff.errors import UserError
from latentdiff.models.finite import check_finite
from latentdiff.models.prompts import warn_of_unknown_words
from latentdiff.pipelines.inputs import check_counts, for_each, guidance_scales, prompt_list
from latentdiff.sampling import build_denoiser, last_latents

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.image_inputs import ImageInput


@dataclass(frozen=True)
class Inversion:
    """Where images come from."""

    latents: Tensor
    """x_T, (B, C, h, w) on the CPU: give it to the pipeline as `latents`."""
    image_latents: Tensor
    """x_0, (B, C, h, w) on the CPU: the autoencoder's latents of the images."""


@torch.no_grad()
def invert(
    pipeline: LatentDiffusionPipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    clip_skip: int | None = None,
    iterations: int = 3,
    timestep_spacing: Any = None,
    batch_size: int = 16,
) -> Inversion:
    """Find the x_T from which DDIM draws the given images.

    The way back is `pipeline(prompt, latents=found.latents, sampler="ddim")` with the same prompt,
    steps, guidance and spacing; another prompt there edits the image.

    Args:    image: a file, a PIL image, several, or a tensor (B, 3, H, W) in 0 … 1.
             prompt: what the images show, one text for all or one each; may be empty.
             height, width: images are cropped and resized to it; None: the size of the training.
             num_inference_steps: of the way back.
             guidance_scale: of the way back; above 1 the round trip loses accuracy.
             clip_skip: of the way back.
             iterations: network calls per step; 1 is three times as fast and less exact.
             timestep_spacing: None: as the model's folder says.
             batch_size: images per pass; does not change them.
    Raises:  UserError: any argument outside this, before any work.
             NotFiniteError: the autoencoder, the text encoder or the U-Net gave NaN or infinity.
    """
    guidance_scales(guidance_scale, 1)
    check_counts(
        num_inference_steps=num_inference_steps, iterations=iterations, batch_size=batch_size
    )
    size = pipeline.image_size(height, width)
    pixels = image_tensors(image, size)
    prompts = for_each(prompt_list(prompt, "prompt"), len(pixels), "prompt", "text", "images")
    warn_of_unknown_words(pipeline.text_encoder.tokenizer, prompts)
    plan = pipeline.sampling_plan(num_inference_steps, sampler="ddim", spacing=timestep_spacing)

    vae, encoder = pipeline.autoencoder, pipeline.text_encoder
    skip, found = encoder.checked_skip(clip_skip), []
    for start in range(0, len(pixels), batch_size):
        own = slice(start, start + batch_size)
        x_0 = vae.encode(pixels[own].to(pipeline.device))
        check_finite(x_0, "the image's latents", "the autoencoder's encoder", vae.module)
        context, empty = (encoder.encode(texts, skip) for texts in (prompts[own], [""]))
        check_finite(torch.cat([context, empty]), "its states", "the text encoder", encoder.module)
        network = pipeline.network_for(size)
        denoiser = build_denoiser(network, context, empty, guidance_scale)
        timesteps, options = plan.timesteps, {"iterations": iterations, **plan.options}
        states = ddim_inversion(denoiser, x_0, pipeline.schedule, timesteps, **options)
        found.append((last_latents(network, x_0, states).cpu(), x_0.cpu()))
    return Inversion(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def image_tensors(image: ImageInput, size: tuple[int, int]) -> Tensor:
    """Images as (B, 3, height, width) in [−1, 1], cropped and resized in the middle.

    Raises: UserError: see `read_images`; a tensor that is not (B, 3, height, width).
    """
    from latentdiff.data.images import to_rgb, to_tensor
    from latentdiff.pipelines.image_inputs import decoded_images

    if isinstance(image, Tensor):
        if image.ndim != 4 or tuple(image.shape[1:]) != (3, *size) or not len(image):
            raise UserError(
                f"image must be a tensor (images, 3, {size[0]}, {size[1]}) in 0 … 1 here; got "
                f"{tuple(image.shape)}."
            )
        return image.float() * 2 - 1
    return torch.stack([to_tensor(one, size) for one in decoded_images(image, "image", to_rgb)])
