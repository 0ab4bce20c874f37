"""Text to image in two passes, larger than the model was trained on: small, enlarged, refined.

Beyond the size of its training a model repeats what it draws. So the layout is drawn at that size,
enlarged in pixels, and drawn anew from there with part of the noise; A1111 calls it hires fix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.images import to_output
from latentdiff.pipelines.call import stream_task
from latentdiff.pipelines.inputs import check_pixels, check_share, is_number
from latentdiff.pipelines.task import Batch, Events, PipelineOutput, Progress, Task

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

#: As A1111's hires fix begins with a denoising strength of 0.7.
STRENGTH = 0.7
#: Larger in one go is only blurred.
MOST = 8


def enlarged_size(
    size: tuple[int, int], scale: Any, strength: Any, multiple: int
) -> tuple[int, int]:
    """(height, width) of the second pass. Raises: UserError: out of range, or too many pixels."""
    if not is_number(scale, most=MOST) or scale <= 1:
        raise UserError(f"hires_scale must be above 1 and at most {MOST}; got {scale!r:.40}.")
    check_share("hires_strength", strength)
    height, width = (round(side * scale / multiple) * multiple for side in size)
    check_pixels(height, width, "the size after hires_scale")
    return height, width


@torch.no_grad()
def stream_two_passes(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    size: tuple[int, int],
    scale: float,
    strength: float,
    latents: Tensor | None,
    options: dict[str, Any],
) -> Events:
    """A `Progress` after each step of both passes, then the large images.

    Args:    size: of the first pass.  scale: above 1.
             strength: 0 … 1, the share of the steps that the second pass runs.
             latents: initial noise of the first.  options: `SamplingOptions`.
    """
    vae, output_type = pipeline.autoencoder, options.get("output_type", "pil")
    large = enlarged_size(size, scale, strength, vae.downscale)
    done, latent = 0, {**options, "output_type": "latent"}
    task = Task(size, next_strength=strength)
    for event in stream_task(pipeline, prompt, task, latents=latents, **latent):
        if isinstance(event, Progress):
            done = event.step
            yield event
        else:
            first = event
    small = first.images
    if pipeline._interrupt:
        images = small if output_type == "latent" else vae.decode(small)
        yield replace(first, images=to_output(images, output_type))
        return

    def start(batch: Batch) -> Tensor:
        """One by one: the batch does not change them."""
        images = (vae.decode(small[k : k + 1]) for k in batch.indices)
        enlarged = (F.interpolate(one, size=large, mode="bicubic").clamp(-1, 1) for one in images)
        return torch.cat([vae.encode(one) for one in enlarged])

    arguments = {"hires_scale": scale, "hires_strength": strength}
    task = Task(large, start=start, strength=strength, done=done)
    for event in stream_task(pipeline, prompt, task, **{**options, "seed": first.seeds}):
        if isinstance(event, PipelineOutput):
            own = {"height": size[0], "width": size[1], "arguments": arguments}
            own |= {} if latents is None else {"latents": "given"}
            event = replace(event, settings=[one | own for one in event.settings])
        yield event
