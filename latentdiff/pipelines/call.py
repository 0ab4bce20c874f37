"""What every task of the pipeline shares: prompts → contexts → denoiser → sampler → images.

    c = text_encoder(prompt),  x_T ~ N(0, I),  x_0 = sampler(task.wrap(unet), x_T, c),
    image = task.finish(decode(x_0))

Images are sampled several at a time. A prompt of several chunks has a longer context than others;
padding the shorter ones would change what cross-attention sees, and so an image by what stands
beside it. Instead the images of one pass have contexts of the same lengths (`passes`).

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.samplers import SamplerState, warn_of_late_start
from latentdiff.errors import UserError, choice_error, warn
from latentdiff.images import to_output
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
from latentdiff.pipelines.prompt_loras import Files, LoraFolder
from latentdiff.pipelines.settings import image_settings
from latentdiff.pipelines.task import (
    CALLBACK_TENSORS,
    DEFAULT_STEPS,
    Batch,
    Callback,
    Condition,
    Events,
    PipelineOutput,
    Progress,
    Task,
)
from latentdiff.pipelines.wildcards import Wildcards
from latentdiff.sampling import SamplingPlan, build_denoiser, finite_states, sampled_states

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline


class Wanted(NamedTuple):
    """What is wanted of one image."""

    prompt: str
    negative_prompt: str
    scale: float
    """Of guidance."""
    template: str
    """The prompt before wildcards were drawn."""
    files: Files = ()
    """LoRA files that its prompt asks for."""


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
    num_inference_steps: int = DEFAULT_STEPS,
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
    lora_dir: str | Path | LoraFolder | None = None,
    output_type: OutputType = "pil",
    batch_size: int = 16,
    progress: bool = True,
    callback_on_step_end: Callback | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    on_progress: Callable[[Progress], None] | None = None,
) -> Events:
    """Do a task for each prompt: a `Progress` after each step, then the result.

    Args:    latents: initial noise (B, C, h, w) instead of the seeds'.
             Others: see `SamplingOptions`.
    Raises:  UserError: any argument outside what is described there, before any work.
             NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
    """
    check_counts(
        num_images_per_prompt=num_images_per_prompt,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
    )
    prompts, every = prompt_list(prompt, "prompt"), num_images_per_prompt
    seeds = seeds_of(seed, len(prompts) * every)
    scale = pipeline.default_guidance if guidance_scale is None else guidance_scale
    wanted = _wanted(prompts, negative_prompt, scale, seeds, wildcards, lora_dir)
    interval = guidance_interval_of(guidance_interval)
    check_share("guidance_rescale", guidance_rescale)
    check_output_type(output_type)
    texts = dict.fromkeys(text for one in wanted for text in (one.prompt, one.negative_prompt))
    read = {text: pipeline.read_prompt(text, prompt_syntax) for text in texts}
    clip_skip = pipeline.text_encoder.checked_skip(clip_skip)
    on_step = _hook(pipeline, callback_on_step_end, callback_on_step_end_tensor_inputs)
    grids: Sequence[Sequence[float] | None] = task.timesteps or [timesteps]
    plans = [
        pipeline.sampling_plan(
            num_inference_steps,
            sampler=sampler,
            options=sampler_options,
            spacing=timestep_spacing,
            timesteps=own,
        ).shortened(task.strength)
        for own in grids
    ]
    plans = [one for one in plans for _ in range(len(seeds) // len(plans))]
    plan = plans[0]
    if latents is None and task.strength == 1:
        warn_of_late_start(pipeline.schedule, plan.timesteps)
    shape = pipeline.latent_shape(task.size)
    x_T = batch_noise(seeds, shape) if latents is None else latents
    check_latents(x_T, (len(seeds), *shape))
    warn_of_unknown_words(pipeline.text_encoder.tokenizer, read, prompt_syntax == "a1111")
    known = pipeline.components.sampling.known_things
    warn_of_unknown_things(pipeline.text_encoder, (one.prompt for one in wanted), known)

    conditions, loras = _conditions(pipeline, wanted, read, clip_skip)
    if task.blend is not None:
        conditions = task.blend(conditions)
    batches = [
        Batch(own, [k // every for k in own], [seeds[k] for k in own])
        for own in passes(conditions, [one.files for one in wanted], plans, batch_size)
    ]
    guidance = {"rescale": guidance_rescale, "interval": interval}
    hooks = on_step, on_progress
    call = _Call(pipeline, task, wanted, conditions, x_T, plans, guidance, output_type, *hooks)
    with tqdm(initial=task.done, unit="step", leave=False, disable=not progress) as bar:
        done = yield from call.run(batches, bar)
    shared = {
        "prompt_syntax": prompt_syntax,
        "clip_skip": clip_skip,
        "num_inference_steps": num_inference_steps if timesteps is None else len(timesteps),
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
        **({"interrupted": True} if pipeline._interrupt else {}),
    }
    own_texts = wildcards is not None or pipeline._interrupt
    read_prompts = [read[one.prompt] for one in wanted]
    yield _output(call, done, shared, loras, read_prompts, 1 if own_texts else every)


def _wanted(
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    guidance_scale: float | Sequence[float],
    seeds: Sequence[int],
    wildcards: str | Path | None,
    lora_dir: str | Path | LoraFolder | None,
) -> list[Wanted]:
    """What is wanted of each image; wildcards make texts of its own of each. Raises: UserError."""
    negative = "" if negative_prompt is None else negative_prompt
    negatives = prompt_list(negative, "negative_prompt")
    negatives = for_each(negatives, len(prompts), "negative_prompt", "text")
    scales = guidance_scales(guidance_scale, len(prompts))
    warn_of_unused_negatives(negatives, scales)
    every = len(seeds) // len(prompts)
    given = zip(prompts, negatives, scales, prompts, strict=True)
    wanted = [Wanted(*one) for one in given for _ in range(every)]
    if wildcards is not None:
        choices = Wildcards(wildcards)
        drawn = [choices.expand(one[:2], seed) for one, seed in zip(wanted, seeds, strict=True)]
        wanted = [
            one._replace(prompt=prompt, negative_prompt=negative)
            for one, (prompt, negative) in zip(wanted, drawn, strict=True)
        ]
    if lora_dir is not None:
        folder = lora_dir if isinstance(lora_dir, LoraFolder) else LoraFolder(lora_dir)
        split = [folder.split(one.prompt) for one in wanted]
        wanted = [
            one._replace(prompt=prompt, files=files)
            for one, (prompt, files) in zip(wanted, split, strict=True)
        ]
    return wanted


def _conditions(
    pipeline: LatentDiffusionPipeline,
    wanted: Sequence[Wanted],
    read: Mapping[str, ReadPrompt],
    clip_skip: int | None,
) -> tuple[list[Condition], dict[Files, list[dict[str, Any]]]]:
    """The condition of each image, and the records of the LoRA files that prompts ask for."""
    context, loras = dict[tuple[Files, str], Tensor](), dict[Files, list[dict[str, Any]]]()
    for files in dict.fromkeys(one.files for one in wanted):
        parts = {text: read[text] for one in wanted if one.files == files for text in one[:2]}
        with pipeline.loras.also(files) as loras[files]:
            encoded = _encoded(pipeline, parts, clip_skip)
        context |= {(files, text): states for text, states in encoded.items()}
    conditions = [
        Condition(
            context[one.files, one.prompt], context[one.files, one.negative_prompt], one.scale
        )
        for one in wanted
    ]
    return conditions, loras


def _output(
    call: _Call,
    done: Sequence[tuple[Batch, Tensor]],
    shared: Mapping[str, Any],
    loras: Mapping[Files, list[dict[str, Any]]],
    prompts: Sequence[ReadPrompt],
    every: int,
) -> PipelineOutput:
    """The result of the passes that were made: not all, where it was interrupted.

    Args:    shared: what is recorded of all images.
             prompts: of each image, one in `every` of which is given back.
    """
    pipeline, wanted = call.pipeline, call.wanted
    found = {k: one for batch, images in done for k, one in zip(batch.indices, images, strict=True)}
    seeds = {k: s for batch, _ in done for k, s in zip(batch.indices, batch.seeds, strict=True)}
    order = sorted(found)
    settings = image_settings(pipeline, [batch for batch, _ in done], wanted, shared)
    for k, one in zip(order, settings, strict=True):
        one["loras"] = [*one["loras"], *loras[wanted[k].files]]
        one["steps_run"] = call.plans[k].steps
    images = torch.stack([found[k] for k in order])
    check = None if call.output_type == "latent" else pipeline.safety_checker
    return PipelineOutput(
        to_output(images, call.output_type),
        [seeds[k] for k in order],
        [prompts[k] for k in order][::every],
        max(plan.steps for plan in call.plans),
        settings,
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
    wanted: Sequence[Wanted]
    conditions: Sequence[Condition]
    noise: Tensor
    plans: Sequence[SamplingPlan]
    guidance: Mapping[str, Any]
    output_type: OutputType
    on_step: Callable[[SamplerState], None]
    on_progress: Callable[[Progress], None] | None

    def run(
        self, batches: list[Batch], bar: Any
    ) -> Generator[Progress, None, list[tuple[Batch, Tensor]]]:
        """All passes, or those until `pipeline._interrupt` was set.

        A pass that runs out of memory is done again in halves, and so are those behind it.

        Returns: the passes that were made, with their images or latents.
        Raises:  UserError: no memory for one image at a time.
        """
        found, done = list[tuple[Batch, Tensor]](), self.task.done
        self.pipeline._interrupt = False
        while batches and not self.pipeline._interrupt:
            batch, images = batches[0], None
            later = [*batches, *(one for one, _ in found)]
            bar.total = done + sum(map(self.steps, batches)) + sum(map(self.next_steps, later))
            try:
                with self.pipeline.loras.also(self.wanted[batch.indices[0]].files):
                    x, states = self.start(batch)
                    for state in states:
                        x, done = state.x_t, done + 1
                        bar.update()
                        self.on_step(state)
                        tensors = state.x_t, state.x_0, self.pipeline.preview
                        at = Progress(done, bar.total, state.t, batch.indices, *tensors)
                        if self.on_progress is not None:
                            self.on_progress(at)
                        yield at
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

    def steps(self, batch: Batch) -> int:
        return self.plans[batch.indices[0]].steps

    def next_steps(self, batch: Batch) -> int:
        return self.plans[batch.indices[0]].shortened(self.task.next_strength).steps

    def start(self, batch: Batch) -> tuple[Tensor, Iterable[SamplerState]]:
        """Where a pass begins, (B, C, h, w), and the states behind it."""
        pipeline, task, device = self.pipeline, self.task, self.pipeline.device
        plan = self.plans[batch.indices[0]]
        x = self.noise[batch.indices].to(device, torch.float32)
        if task.start is not None and task.strength < 1:
            x_0 = task.start(batch).to(device, torch.float32)
            if not plan.steps:
                return x_0, ()
            t = plan.timesteps[0]
            x = pipeline.schedule.alpha(t) * x_0 + pipeline.schedule.sigma(t) * x
        own = [self.conditions[k] for k in batch.indices]
        contexts, negatives, scales = zip(*own, strict=True)
        network = pipeline.network_for(task.size, task.extra(batch) if task.extra else None)
        both = torch.stack(contexts), torch.stack(negatives)
        denoiser = build_denoiser(network, *both, scales, **self.guidance)
        if task.wrap is not None:
            denoiser = task.wrap(denoiser, batch)
        return x, finite_states(network, sampled_states(network, denoiser, x, batch.seeds, plan))

    def finished(self, x_0: Tensor, batch: Batch) -> Tensor:
        """Images (B, 3, H, W) in [−1, 1] of latents, or these."""
        x_0 = self.task.settle(x_0, batch) if self.task.settle else x_0
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


def passes(
    conditions: Sequence[Condition],
    files: Sequence[Files],
    plans: Sequence[SamplingPlan],
    batch_size: int,
) -> list[list[int]]:
    """Which images are sampled together: at most batch_size, with contexts of the same lengths,
    the same LoRA files and the same timesteps."""
    groups: dict[tuple[int, int, Files, tuple[float, ...]], list[int]] = {}
    for index, (one, own, plan) in enumerate(zip(conditions, files, plans, strict=True)):
        key = len(one.context), len(one.negative), own, tuple(plan.timesteps.tolist())
        groups.setdefault(key, []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
