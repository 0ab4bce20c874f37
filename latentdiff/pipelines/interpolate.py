"""From one image to the next: frames between prompts, between seeds, or both.

    c = (1 − w) c_i + w c_{i+1},      x_T = [sin((1 − w) θ) ε_i + sin(w θ) ε_{i+1}] / sin θ

Contexts lie on a line; noise turns by the angle θ between its ends, which keeps its deviation
(Shoemake 1985, doi:10.1145/325334.325242; of DDIM, Song et al. 2021, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch

from latentdiff.diffusion.noise import batch_noise, slerp
from latentdiff.errors import UserError
from latentdiff.models.prompts import NETWORK
from latentdiff.pipelines.call import stream_task
from latentdiff.pipelines.inputs import check_counts, for_each, prompt_list, seeds_of, warn_of_size
from latentdiff.pipelines.task import (
    Condition,
    Events,
    PipelineOutput,
    SamplingOptions,
    Task,
    run_to_the_end,
)

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

MOST_FRAMES = 9999
#: Options that there may be one of for each prompt.
_EACH: tuple[Literal["negative_prompt", "guidance_scale"], ...] = (
    "negative_prompt",
    "guidance_scale",
)


@run_to_the_end
def interpolate(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    frames: int = 16,
    *,
    height: int | None = None,
    width: int | None = None,
    **options: Unpack[SamplingOptions],
) -> Events:
    """Draw frames from the first prompt and seed to the last; `images.save_animation` makes a GIF.

    Args:    prompt: one for all frames, or several to pass through, evenly.
             frames: how many in all, the ends included.
             height, width: see `LatentDiffusionPipeline.__call__`.
             options: `seed` may be several, to pass through; with one, all frames begin from its
             noise. negative_prompt and guidance_scale may be one for each prompt.
    Raises:  UserError: neither two prompts nor two seeds; fewer frames than these; prompts of
             different numbers of chunks, or that ask for different LoRA files.
    """
    prompts, seed = prompt_list(prompt, "prompt"), options.get("seed")
    several = isinstance(seed, Sequence) and not isinstance(seed, str)
    seeds = seeds_of(seed, len(seed) if several else 1)  # type: ignore[arg-type]
    keys = max(len(prompts), len(seeds))
    check_counts(frames=frames)
    if keys < 2 or not keys <= frames <= MOST_FRAMES:
        raise UserError(
            "interpolate needs at least two prompts or two seeds, and as many frames, up to "
            f"{MOST_FRAMES}; got {len(prompts)} prompt(s), {len(seeds)} seed(s), {frames} frame(s)."
        )
    if options.get("num_images_per_prompt", 1) != 1:
        raise UserError("interpolate draws one image per frame: leave num_images_per_prompt out.")
    if options.get("lora_dir") is not None and len({*map(_tags, prompts)}) > 1:
        raise UserError(
            "prompts to interpolate between must ask for the same LoRA files, which do not blend; "
            f"got {' and '.join(repr(text) for text in prompts):.200}."
        )
    prompts = for_each(prompts, keys, "prompt", "text", "seeds")
    seeds = for_each(seeds, keys, "seed", "number", "prompts")
    places = [k * (keys - 1) / (frames - 1) for k in range(frames)]
    near = [round(place) for place in places]
    ends = [(min(int(place), keys - 2), place) for place in places]
    size = pipeline.image_size(height, width)
    warn_of_size(size, pipeline.default_size, "Leave the size out and upscale the frames.")
    noise = batch_noise(seeds, pipeline.latent_shape(size))

    def blend(conditions: list[Condition]) -> list[Condition]:
        of_key = [conditions[near.index(i)] for i in range(keys)]
        return [_between(of_key[i], of_key[i + 1], place - i) for i, place in ends]

    frame_options: SamplingOptions = {**options, "seed": [seeds[i] for i in near]}
    negatives, scales = options.get("negative_prompt"), options.get("guidance_scale")
    if isinstance(negatives, Sequence) and not isinstance(negatives, str):
        negatives = for_each(list(negatives), keys, "negative_prompt", "text")
        frame_options["negative_prompt"] = [negatives[i] for i in near]
    if isinstance(scales, Sequence) and not isinstance(scales, str):
        scales = for_each(list(scales), keys, "guidance_scale", "number")
        frame_options["guidance_scale"] = [scales[i] for i in near]
    stream = stream_task(
        pipeline,
        [prompts[i] for i in near],
        Task(size, blend=blend),
        latents=torch.stack([slerp(noise[i], noise[i + 1], place - i) for i, place in ends]),
        **frame_options,
    )
    call = {"prompt": prompts, "seed": seeds, "frames": frames, "height": size[0], "width": size[1]}
    call |= {name: options[name] for name in _EACH if name in options}
    for event in stream:
        if isinstance(event, PipelineOutput):
            if len(event.settings) == frames:  # not interrupted: the texts drawn, without tags
                drawn = [event.settings[near.index(i)] for i in range(keys)]
                texts = {"prompt", "negative_prompt"} & call.keys()
                call |= {name: [one[name] for one in drawn] for name in texts}
            for k, settings in enumerate(event.settings):
                settings |= {"task": "interpolate", "arguments": {**call, "frame": k}}
                del settings["latents"]  # which follow from these
        yield event


def _tags(prompt: str) -> tuple[Any, ...]:
    """The LoRA files that a prompt asks for, and their weights."""
    return tuple(NETWORK.findall(prompt))


def _between(first: Condition, second: Condition, w: float) -> Condition:
    if first.context.shape != second.context.shape or first.negative.shape != second.negative.shape:
        raise UserError(
            "prompts to interpolate between must have the same number of chunks; these have "
            f"{len(first.context)} and {len(second.context)} tokens. Shorten the longer one."
        )
    return first._replace(
        context=torch.lerp(first.context, second.context, w),
        negative=torch.lerp(first.negative, second.negative, w),
        scale=(1 - w) * first.scale + w * second.scale,
    )
