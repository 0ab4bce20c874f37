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

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.samplers import Denoiser, SamplerState, warn_of_late_start
from latentdiff.errors import UserError, choice_error, warn
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
from latentdiff.sampling import SamplingPlan, build_denoiser, finite_states, sampled_states

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentdiff.pipelines.generate import LatentDiffusionPipeline


Callback = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
#: What a callback may ask for.
CALLBACK_TENSORS = ("latents", "denoised")


class SamplingOptions(TypedDict, total=False):
    """What every task takes, by name."""

    negative_prompt: str | Sequence[str] | None
    """What to steer away from, one for all or one for each prompt."""
    prompt_syntax: PromptSyntax
    """plain: what does not fit into the text encoder is cut off, with a warning; long: it goes on
    in further chunks; a1111: so too, with weights such as (red:1.3) and with BREAK, see
    `prompts.parse`. For negative prompts too."""
    clip_skip: int | None
    """How many of the text encoder's last layers are left out, for negative prompts too; 1 is what
    A1111 calls Clip skip 2. None: as many as in the model's training."""
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
    callback_on_step_end: Callback | None
    """Called after each step of each pass as (pipeline, step, timestep, tensors), with the step of
    0 … and the `callback_on_step_end_tensor_inputs` by name. It may return other latents under that
    name, and set `pipeline._interrupt` to end here."""
    callback_on_step_end_tensor_inputs: Sequence[str]
    """latents, the state (B, C, h, w) after the step; denoised, its estimate of the clean ones."""


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
    flagged: list[bool] | None = None
    """What the safety checker says of each image; None: there is none, or the images are latents.
    They are as they were drawn all the same."""

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


@dataclass(frozen=True)
class Progress:
    """Where a call is after a step."""

    step: int
    """1 … total, through all passes."""
    total: int
    timestep: float
    """The one just left."""
    indices: list[int]
    """Which of the call's images these are."""
    latents: Tensor
    """(B, C, h, w), the state after the step."""
    denoised: Tensor
    """(B, C, h, w), the step's estimate of the clean latents."""
    show: Callable[[Tensor], list[Image]] = field(repr=False)
    """The pipeline's `preview`."""

    @property
    def preview(self) -> list[Image]:
        """How the images look so far."""
        return self.show(self.denoised)


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
    """Channels (B, E, h, w) that the U-Net takes after those of x_t."""
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


def run_task(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    task: Task,
    *,
    latents: Tensor | None = None,
    **options: Unpack[SamplingOptions],
) -> PipelineOutput:
    """Do a task for each prompt; arguments: `stream_task`."""
    return result_of(stream_task(pipeline, prompt, task, latents=latents, **options))


def result_of(events: Iterable[Progress | PipelineOutput]) -> PipelineOutput:
    """What a stream gives last."""
    for event in events:
        output = event
    assert isinstance(output, PipelineOutput)
    return output


@torch.no_grad()
def stream_task(
    pipeline: LatentDiffusionPipeline,
    prompt: str | Sequence[str],
    task: Task,
    *,
    latents: Tensor | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    prompt_syntax: PromptSyntax = "plain",
    clip_skip: int | None = None,
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
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> Iterator[Progress | PipelineOutput]:
    """Do a task for each prompt: a `Progress` after each step, then the result.

    Args:    latents: initial noise (B, C, h, w) instead of the seeds'.
             Others: see `SamplingOptions`.
    Raises:  UserError: any argument outside what is described there, before any work.
             NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
    """
    if pipeline.unet.config.inpaints and task.extra is None:
        raise UserError(
            "this is an inpainting model: it paints a masked part of an image and draws nothing "
            "without one. Call inpaint or outpaint (latentdiff edit inpaint), or take a "
            "text-to-image model."
        )
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
    clip_skip = pipeline.text_encoder.checked_skip(clip_skip)
    on_step = _hook(pipeline, callback_on_step_end, callback_on_step_end_tensor_inputs)
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

    context = _encoded(pipeline, read, clip_skip)
    conditions = [
        Condition(context[own], context[negative], scale, own, negative)
        for (own, negative), scale in zip(texts, scales, strict=True)
    ]
    batches = [
        Batch(own, [k // num_images_per_prompt for k in own], [seeds[k] for k in own])
        for own in passes(conditions, batch_size)
    ]
    guidance = {"rescale": guidance_rescale, "interval": interval}
    call = _Call(pipeline, task, conditions, x_T, plan, guidance, output_type, on_step)
    with tqdm(unit="step", leave=False, disable=not progress) as bar:
        done = yield from call.run(batches, bar)
    found = {k: one for batch, images in done for k, one in zip(batch.indices, images, strict=True)}
    order = sorted(found)  # not all, where it was interrupted
    every = 1 if wildcards is not None else num_images_per_prompt
    read_prompts = [read[own] for own, _ in texts[::every]]
    shared = {
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
        "clip_skip": clip_skip,
        **({} if latents is None else {"latents": "given"}),
    }
    images = torch.stack([found[k] for k in order])
    check = None if output_type == "latent" else pipeline.safety_checker
    yield PipelineOutput(
        to_output(images, output_type),
        [seeds[k] for k in order],
        read_prompts,
        len(plan.timesteps),
        image_settings(pipeline, [batch for batch, _ in done], conditions, shared),
        None if check is None else [f for one in images[:, :3].split(1) for f in check(one)],
    )


def _hook(
    pipeline: LatentDiffusionPipeline, callback: Callback | None, names: Sequence[str]
) -> Callable[[SamplerState], None]:
    """What a caller has done after each step. Raises: UserError: an unknown name."""
    for name in names:
        if name not in CALLBACK_TENSORS:
            raise choice_error("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)

    def after(state: SamplerState) -> None:
        if callback is None:
            return
        tensors = {"latents": state.x_t, "denoised": state.x_0}
        asked = {name: tensors[name] for name in names}
        changed = (callback(pipeline, state.step, state.t, asked) or {}).get("latents")
        if changed is not None and changed is not state.x_t:
            check_latents(changed, tuple(state.x_t.shape))
            state.x_t.copy_(changed)  # the sampler goes on from this very tensor

    return after


def _encoded(
    pipeline: LatentDiffusionPipeline, read: Mapping[str, ReadPrompt], clip_skip: int | None
) -> dict[str, Tensor]:
    """The context (tokens, width) of each text."""
    encoder = pipeline.text_encoder
    states = encode_prompts(encoder, list(read.values()), clip_skip)
    check_finite(torch.cat(states), "its states", "the text encoder", encoder.module)
    return dict(zip(read, states, strict=True))


@dataclass(frozen=True)
class _Call:
    """What all passes of a call share."""

    pipeline: LatentDiffusionPipeline
    task: Task
    conditions: Sequence[Condition]
    noise: Tensor
    plan: SamplingPlan
    guidance: Mapping[str, Any]
    output_type: OutputType
    on_step: Callable[[SamplerState], None]

    def run(
        self, batches: list[Batch], bar: Any
    ) -> Generator[Progress, None, list[tuple[Batch, Tensor]]]:
        """All passes, or those until `pipeline._interrupt` was set.

        A pass that runs out of memory is done again in halves, and so are those behind it.

        Returns: the passes with their images, or latents.
        Raises:  UserError: no memory for one image at a time.
        """
        found, done = list[tuple[Batch, Tensor]](), 0
        self.pipeline._interrupt = False
        while batches and not self.pipeline._interrupt:
            batch, images = batches[0], None
            bar.total = done + len(self.plan.timesteps) * len(batches)
            try:
                x, states = self.start(batch)
                for state in states:
                    x, done = state.x_t, done + 1
                    bar.update()
                    self.on_step(state)
                    tensors = state.x_t, state.x_0, self.pipeline.preview
                    yield Progress(done, bar.total, state.t, batch.indices, *tensors)
                    if self.pipeline._interrupt:
                        x = state.x_0
                        break
                images = self.finished(x, batch)
            except torch.OutOfMemoryError as error:
                batches = _halved(batches, error)
            if images is None:
                _free_memory()  # here, since the handler keeps what was computed alive
            else:
                found.append((batch, images))
                batches = batches[1:]
        return found

    def start(self, batch: Batch) -> tuple[Tensor, Iterable[SamplerState]]:
        """Where a pass begins, (B, C, h, w), and the states behind it."""
        pipeline, task, plan, device = self.pipeline, self.task, self.plan, self.pipeline.device
        x = self.noise[batch.indices].to(device, torch.float32)
        if task.start is not None and task.strength < 1:
            x_0 = task.start(batch).to(device, torch.float32)
            if not len(plan.timesteps):
                return x_0, ()
            t = plan.timesteps[0]
            x = pipeline.schedule.alpha(t) * x_0 + pipeline.schedule.sigma(t) * x
        own = [self.conditions[k] for k in batch.indices]
        contexts, negatives, scales, *_ = zip(*own, strict=True)
        extra = None if task.extra is None else task.extra(batch).to(device)
        network = replace(pipeline.network, extra=extra)
        both = torch.stack(contexts), torch.stack(negatives)
        denoiser = build_denoiser(network, *both, scales, **self.guidance)
        if task.wrap is not None:
            denoiser = task.wrap(denoiser, batch)
        return x, finite_states(network, sampled_states(network, denoiser, x, batch.seeds, plan))

    def finished(self, x_0: Tensor, batch: Batch) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] of latents, or these."""
        x_0 = x_0 if self.task.settle is None else self.task.settle(x_0, batch)
        if self.output_type == "latent":
            return x_0
        images = self.pipeline.autoencoder.decode(x_0)
        return self.task.finish(images, batch) if self.task.finish else images


def _halved(batches: Sequence[Batch], error: torch.OutOfMemoryError) -> list[Batch]:
    """The same images in passes of half as many as the first, with a note."""
    many = len(batches[0].indices)
    if many == 1:
        raise UserError(
            "the memory does not hold even one image at a time. Draw a smaller one, or call "
            "pipeline.enable_vae_tiling() and pipeline.enable_model_cpu_offload() before."
        ) from error
    few = many // 2
    warn(f"out of memory with {many} images at a time; going on with {few}. The images stay.")
    return [
        Batch(*(part[k : k + few] for part in batch))
        for batch in batches
        for k in range(0, len(batch.indices), few)
    ]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
