"""What every task of the pipeline shares: prompts → contexts → denoiser → sampler → images.

    c = text_encoder(prompt),  x_T ~ N(0, I),  x_0 = sampler(task.wrap(unet), x_T, c),
    image = task.finish(decode(x_0))

A `Task` says what is made besides an image of a prompt: what it begins from, what steers it, what
becomes of the decoded images. Text to image is the task that says nothing.

Images are sampled several at a time. A prompt of several chunks has a longer context than others;
padding the shorter ones would change what cross-attention sees, and so an image by what stands
beside it. Instead the images of one pass have contexts of the same lengths (`passes`).

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.samplers import Denoiser, warn_of_late_start
from latentdiff.errors import UserError
from latentdiff.images import check_image_file, numbered, to_output
from latentdiff.models.finite import check_finite
from latentdiff.models.known_things import warn_of_unknown_things
from latentdiff.models.prompts import (
    PromptSyntax,
    ReadPrompt,
    encode_prompts,
    warn_of_unknown_words,
)
from latentdiff.pipelines.inputs import (
    OutputType,
    check_counts,
    check_latents,
    check_output_type,
    check_share,
    for_each,
    guidance_interval_of,
    guidance_scales,
    prompt_list,
    seeds_of,
    warn_of_unused_negatives,
)
from latentdiff.pipelines.metadata import write
from latentdiff.pipelines.settings import image_settings
from latentdiff.pipelines.wildcards import Wildcards
from latentdiff.sampling import SamplingPlan, build_denoiser, sample_latents

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline


class SamplingOptions(TypedDict, total=False):
    """What every task takes, by name."""

    negative_prompt: str | Sequence[str] | None
    """What to steer away from, one for all or one for each prompt."""
    prompt_syntax: PromptSyntax
    """plain: what does not fit into the text encoder is cut off, with a warning; long: it goes on
    in further chunks; a1111: so too, with weights such as (red:1.3) and with BREAK, see
    `prompts.parse`. For negative prompts too."""
    num_inference_steps: int
    """1 … T, default 25; more is finer and slower."""
    guidance_scale: float | Sequence[float] | None
    """Up to 1 = off; higher follows the prompt more closely; None: the model's own
    (generation_config.json in its folder), or 5. One for all or one for each prompt."""
    guidance_rescale: float
    """0 … 1, against washed-out images at high guidance."""
    guidance_interval: Sequence[float] | None
    """Guide only at timesteps low … high; the steps outside take half the time."""
    num_images_per_prompt: int
    """Images of one prompt stand next to each other."""
    sampler: str | None
    """A name in SAMPLERS, or what diffusers or A1111 call it ("DPM++ 2M Karras"); None: as the
    model's folder says."""
    sampler_options: dict[str, Any] | None
    """For the sampler, for example {"eta": 1.0} for ddim."""
    timestep_spacing: str | None
    """A name in SPACINGS; None: as the sampler or the folder says."""
    timesteps: Sequence[float] | None
    """Your own, decreasing, instead of num_inference_steps and a spacing."""
    seed: int | Sequence[int] | None
    """Of the first image, image k has seed + k, below 2^64; or of each image; None: drawn, see
    `.seeds`."""
    wildcards: str | Path | None
    """A folder of text files: `__animal__` in a prompt is a line of animal.txt and `{a|b}` a or b,
    drawn for each image from its own seed, see `wildcards`; None: they are text."""
    output_type: OutputType
    """pil, np, pt or latent; see `PipelineOutput`."""
    batch_size: int
    """Images per pass, default 16; does not change them."""
    progress: bool
    """Show a bar on the terminal."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline gives back."""

    images: Any
    """A list of PIL images; or an array (B, H, W, 3) or tensor (B, 3, H, W) in 0 … 1; or latents
    (B, C, h, w), as `output_type` asked."""
    seeds: list[int]
    """The seed of each image: give it as `seed` to get that image again."""
    prompts: list[ReadPrompt] = field(default_factory=list)
    """How each prompt was read: its tokens, its chunks, words that did not fit. With wildcards,
    that of each image."""
    steps: int = 0
    """How many steps were run: those asked for, or `strength`'s share of them."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """How each image was made, as `save` writes it; see `settings.image_settings`."""

    def save(self, file: str | Path) -> list[Path]:
        """Write the images and how they were made: one as `file`, several as file-000.png ….

        Raises:  UserError: `output_type` was not pil, or a file cannot be written.
        """
        file = Path(file)
        check_image_file(file, "file")
        if not isinstance(self.images, list):
            raise UserError("only images of output_type='pil' can be saved.")
        files = numbered(file, len(self.images))
        return [write(*one) for one in zip(self.images, files, self.settings, strict=True)]


class Batch(NamedTuple):
    """The images of one pass."""

    indices: list[int]
    """Which of the call's images they are."""
    prompts: list[int]
    """The number of each one's prompt."""
    seeds: list[int]


@dataclass(frozen=True)
class Task:
    """What is made besides an image of a prompt; its functions are called pass by pass."""

    size: tuple[int, int]
    """(height, width) in pixels of what the U-Net works on."""
    name: str = "text_to_image"
    """The method of the pipeline that it is."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the method was given besides prompt and `SamplingOptions`, to be recorded; see
    `settings.given`."""
    start: Callable[[Batch], Tensor] | None = None
    """Latents (B, C, h, w) to begin from, with noise in `strength`'s measure; None: pure noise."""
    strength: float = 1.0
    """0 … 1, how much of the way from noise is gone: 1 begins at pure noise, 0 runs no step."""
    wrap: Callable[[Denoiser, Batch], Denoiser] | None = None
    """Steers the model's denoiser, see `diffusion.guidance`."""
    extra: Callable[[Batch], Tensor] | None = None
    """Channels (B, E, h, w) that the U-Net takes after those of x_t; None: those of `network`."""
    settle: Callable[[Tensor, Batch], Tensor] | None = None
    """Sampled latents (B, C, h, w) → those that are decoded."""
    finish: Callable[[Tensor, Batch], Tensor] | None = None
    """Decoded images (B, 3, H, W) in [−1, 1] → those of the result."""


class Condition(NamedTuple):
    """What the denoiser of one image is given."""

    context: Tensor
    """(tokens, width) of its prompt."""
    negative: Tensor
    """The same of its negative prompt."""
    scale: float
    """Of guidance."""
    prompt: str
    negative_prompt: str


@torch.no_grad()
def run_task(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    task: Task,
    *,
    latents: Tensor | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_syntax: PromptSyntax = "plain",
    num_inference_steps: int = 25,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] | None = None,
    num_images_per_prompt: int = 1,
    sampler: str | None = None,
    sampler_options: dict[str, Any] | None = None,
    timestep_spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    seed: int | Sequence[int] | None = None,
    wildcards: str | Path | None = None,
    output_type: OutputType = "pil",
    batch_size: int = 16,
    progress: bool = True,
) -> PipelineOutput:
    """Do a task for each prompt.

    Args:    latents: initial noise (B, C, h, w) instead of the seeds'.
             Others: see `SamplingOptions`.
    Raises:  UserError: any argument outside what is described there, before any work.
             NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
    """
    prompts = prompt_list(prompt, "prompt")
    negative = "" if negative_prompt is None else negative_prompt
    negatives = prompt_list(negative, "negative_prompt")
    negatives = for_each(negatives, len(prompts), "negative_prompt", "text")
    scale = pipeline.default_guidance if guidance_scale is None else guidance_scale
    scales = guidance_scales(scale, len(prompts))
    warn_of_unused_negatives(negatives, scales)
    interval = guidance_interval_of(guidance_interval)
    check_share("guidance_rescale", guidance_rescale)
    check_output_type(output_type)
    check_counts(
        num_images_per_prompt=num_images_per_prompt,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
    )
    count = len(prompts) * num_images_per_prompt
    seeds = seeds_of(seed, count)
    # By image, since wildcards make a text of its own of each.
    texts = [[p, n] for p, n in zip(prompts, negatives, strict=True)]
    texts = [text for text in texts for _ in range(num_images_per_prompt)]
    if wildcards is not None:
        choices = Wildcards(wildcards)
        texts = [choices.expand(text, own) for text, own in zip(texts, seeds, strict=True)]
    scales = [scale for scale in scales for _ in range(num_images_per_prompt)]
    read = {text: pipeline.read_prompt(text, prompt_syntax) for both in texts for text in both}
    plan = pipeline.sampling_plan(
        num_inference_steps,
        sampler=sampler,
        options=sampler_options,
        spacing=timestep_spacing,
        timesteps=timesteps,
    ).shortened(task.strength)
    if latents is None and task.strength == 1:
        warn_of_late_start(pipeline.schedule, plan.timesteps)
    down = pipeline.autoencoder.downscale
    shape = (pipeline.autoencoder.latent_channels, task.size[0] // down, task.size[1] // down)
    x_T = batch_noise(seeds, shape) if latents is None else latents
    check_latents(x_T, (count, *shape))
    warn_of_unknown_words(pipeline.text_encoder.tokenizer, read, prompt_syntax == "a1111")
    known = pipeline.components.sampling.known_things
    warn_of_unknown_things(pipeline.text_encoder, prompts, known)

    context = _encoded(pipeline, read)
    conditions = [
        Condition(context[own], context[negative], scale, own, negative)
        for (own, negative), scale in zip(texts, scales, strict=True)
    ]
    batches = [
        Batch(own, [k // num_images_per_prompt for k in own], [seeds[k] for k in own])
        for own in passes(conditions, batch_size)
    ]
    guidance = {"rescale": guidance_rescale, "interval": interval}
    found = dict[int, Tensor]()
    total = len(plan.timesteps) * len(batches)
    with tqdm(total=total, unit="step", leave=False, disable=not progress) as bar:
        for batch in batches:
            own = [conditions[k] for k in batch.indices]
            noise = x_T[batch.indices]
            x_0 = _sampled(pipeline, task, own, batch, noise, plan, guidance, bar.update)
            if output_type != "latent":
                x_0 = pipeline.autoencoder.decode(x_0)
                x_0 = task.finish(x_0, batch) if task.finish else x_0
            found |= zip(batch.indices, x_0, strict=True)
    images = torch.stack([found[k] for k in range(count)])
    every = 1 if wildcards is not None else num_images_per_prompt
    read_prompts = [read[own] for own, _ in texts[::every]]
    call = {
        "task": task.name,
        "arguments": dict(task.arguments),
        "prompt_syntax": prompt_syntax,
        "num_inference_steps": num_inference_steps if timesteps is None else len(timesteps),
        "steps_run": len(plan.timesteps),
        "sampler": plan.sampler,
        "sampler_options": dict(plan.options),
        "timestep_spacing": plan.spacing,
        "timesteps": None if timesteps is None else list(timesteps),
        "guidance_rescale": guidance_rescale,
        "guidance_interval": interval,
        "height": task.size[0],
        "width": task.size[1],
        "batch_size": batch_size,
        **({} if latents is None else {"latents": "given"}),
    }
    return PipelineOutput(
        to_output(images, output_type),
        seeds,
        read_prompts,
        len(plan.timesteps),
        image_settings(pipeline, batches, conditions, call),
    )


def _encoded(
    pipeline: LatentDiffusionPipeline, read: Mapping[str, ReadPrompt]
) -> dict[str, Tensor]:
    """The context (tokens, width) of each text."""
    encoder = pipeline.text_encoder
    states = encode_prompts(encoder, list(read.values()))
    check_finite(torch.cat(states), "its states", "the text encoder", encoder.module)
    return dict(zip(read, states, strict=True))


def _sampled(
    pipeline: LatentDiffusionPipeline,
    task: Task,
    conditions: Sequence[Condition],
    batch: Batch,
    noise: Tensor,
    plan: SamplingPlan,
    guidance: Mapping[str, Any],
    on_step: Callable[[], Any],
) -> Tensor:
    """The latents x_0 of one pass, from its noise (B, C, h, w)."""
    x, device = noise.to(pipeline.device, torch.float32), pipeline.device
    if task.start is not None and task.strength < 1:
        x_0 = task.start(batch).to(device, torch.float32)
        if not len(plan.timesteps):
            return x_0
        t = plan.timesteps[0]
        x = pipeline.schedule.alpha(t) * x_0 + pipeline.schedule.sigma(t) * x
    contexts, negatives, scales, *_ = zip(*conditions, strict=True)
    extra = None if task.extra is None else task.extra(batch).to(device)
    network = pipeline.network(task.size, extra)
    both = torch.stack(contexts), torch.stack(negatives)
    denoiser = build_denoiser(network, *both, scales, **guidance)
    if task.wrap is not None:
        denoiser = task.wrap(denoiser, batch)
    x_0 = sample_latents(network, denoiser, x, batch.seeds, plan, on_step)
    return x_0 if task.settle is None else task.settle(x_0, batch)


def passes(conditions: Sequence[Condition], batch_size: int) -> list[list[int]]:
    """Which images are sampled together: at most batch_size, with contexts of the same lengths."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, one in enumerate(conditions):
        groups.setdefault((len(one.context), len(one.negative)), []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
