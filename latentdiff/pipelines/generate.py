"""The contexts of the images of one call, which may be of different lengths.

A prompt of several chunks has a longer context than others. Padding the shorter ones would change
what cross-attention reads, and so a picture by what stands beside it. Instead the images that go
through the network together are of one length, and where a prompt and its negative prompt differ,
each has a pass of its own.

What a pipeline is made of: opening, saving and moving a model, LoRA files, learned words.

Text to image: prompt → context → latents → picture.

    c = text_encoder(prompt),  x_T ~ N(0, I),  x_0 = sampler(unet, x_T, c),  picture = decode(x_0)

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import (
    Predict,
    guide,
    needs_unconditional,
)
from latentdiff.diffusion.noise import batch_noise, step_noise
from latentdiff.diffusion.samplers import (
    as_denoiser,
    custom_grid,
    run,
    timestep_grid,
    warn_of_late_start,
)
from latentdiff.diffusion.samplers.registry import SAMPLERS, check_options, split_name
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.folder import Components
from latentdiff.formats.model import load_model, save_model
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.finite import check_finite, not_finite
from latentdiff.models.prompts import (
    PromptSyntax,
    ReadPrompt,
    add_word,
    check_syntax,
    encode_prompts,
    read_prompt,
    warn_of_unknown_words,
)
from latentdiff.pipelines.images import to_output
from latentdiff.pipelines.inputs import (
    check_latents,
    check_output_type,
    check_pixels,
    check_seed,
    check_share,
    check_steps,
    guidance_interval_of,
    guidance_scales,
    negative_prompts,
    prompt_list,
    warn_of_unused_negatives,
)
from latentdiff.pipelines.inversion import Inversion, invert
from latentdiff.pipelines.lora import Loras, parts_of

ImageContexts = list[list[Tensor]]
"""Per image [of the prompt], or [of the negative prompt, of the prompt]; each (tokens, width)."""


def image_contexts(
    encoder: TextEncoder,
    prompts: Sequence[str],
    negatives: Sequence[str],
    scales: Sequence[float],
    copies: int,
    syntax: str,
    room: int | None,
) -> ImageContexts:
    """Encode each text once, and say what each image gets.

    Args:    negatives, scales: one for each prompt.  copies: images per prompt.
             syntax, room: see `read_prompt`.
    Raises:  NotFiniteError: what the text encoder makes of a prompt.
    """
    words = list(dict.fromkeys([*prompts, *negatives]))
    states = dict(zip(words, encode_prompts(encoder, words, syntax, room), strict=True))
    check_finite(torch.cat([*states.values()]), "its states", "the text encoder", encoder.module)
    guided = needs_unconditional(list(scales))
    return [
        [states[negative], states[prompt]] if guided else [states[prompt]]
        for prompt, negative in zip(prompts, negatives, strict=True)
        for _ in range(copies)
    ]


def passes(contexts: ImageContexts, batch_size: int) -> list[list[int]]:
    """Which images go through the network together: at most batch_size, of the same lengths."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, context in enumerate(contexts):
        groups.setdefault(tuple(map(len, context)), []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def batch_contexts(contexts: ImageContexts, own: Sequence[int]) -> list[Tensor]:
    """The contexts of one pass: [(B, tokens, width)], or the negative ones first."""
    return [torch.stack(half) for half in zip(*(contexts[i] for i in own), strict=True)]


#: Guidance scale when neither the caller nor the model's folder gives one.
DEFAULT_GUIDANCE = 5.0


class LoadedModel:
    """The parts of a model, ready for use, and what can be added to them."""

    def __init__(self, components: Components) -> None:
        """Put parts together.

        Raises: UserError: they do not fit each other.
        """
        components.check()
        self.components = components
        self.unet = components.unet
        self.autoencoder = components.autoencoder
        self.text_encoder = components.text_encoder
        self.schedule = NoiseSchedule(components.schedule)
        self.prediction = components.prediction
        self.loras = Loras(parts_of(components))

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        prediction: str | None = None,
    ) -> Self:
        """Load a model: a folder of diffusers' Stable Diffusion layout, or a single file.

        Args:    folder_or_hub_id: a local folder or a .safetensors or .ckpt file (never touch the
                 network), or a Hugging Face id; None: the model that comes with the package.
                 dtype: of U-Net and text encoder in memory; the autoencoder stays float32.
                 revision: branch, tag or commit on the hub.
                 variant: which weights, where there are several: fp16, non_ema.
                 prediction: eps or v instead of what the model says.
        Raises:  UserError: missing, incomplete, unsupported or inconsistent.
        """
        if folder_or_hub_id is None:
            if not EMBEDDED_MODEL.is_dir():
                raise UserError(
                    f"this installation holds no embedded model ({EMBEDDED_MODEL} does not exist). "
                    "Give a model folder or a Hugging Face id."
                )
            folder_or_hub_id = EMBEDDED_MODEL
        options = {"revision": revision, "variant": variant, "prediction": prediction}
        return cls(load_model(folder_or_hub_id, dtype=dtype, **options))

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        *,
        max_shard_bytes: int | None = None,
    ) -> Path:
        """Write the model, so that this class and diffusers load it; see `save_components`.

        A name that ends in .safetensors makes it a single file; see `save_single_file`. Fused LoRA
        files are in the weights that are written.
        Raises:  UserError: LoRA files are attached, or the folder cannot be written.
        """
        self.loras.check_saved()
        return save_model(folder, self.components, dtype, max_shard_bytes=max_shard_bytes)

    def load_lora(self, path: str | Path, weight: float = 1.0, *, name: str | None = None) -> str:
        """Attach a LoRA file, in diffusers' or kohya's layout, beside those loaded before.

        Args:    path: .safetensors, or a folder with one.  weight: strength; 1 as trained, 0 none.
                 name: to unload it by; None: the file's.
        Returns: its name.
        Raises:  UserError: no LoRA, or not for this model, with what does not fit; the model is
                 as it was.
        """
        return self.loras.load(path, weight, name)

    def fuse_lora(self) -> None:
        """Add the attached LoRA files to the weights: the same pictures, no more to compute."""
        self.loras.fuse()

    def unload_lora(self, name: str | None = None) -> None:
        """Take one LoRA file off, or all, fused or not; the weights are what they were, exactly."""
        self.loras.unload(name)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move to a device and set the dtype of U-Net and text encoder; returns itself.

        The autoencoder stays float32: Stable Diffusion's decoders overflow in float16.
        """
        self.unet.to(device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        self.autoencoder.to(device=device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.unet.device

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) of the images the model was trained on."""
        size = self.unet.config.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.autoencoder.downscale, width * self.autoencoder.downscale

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) to draw, where None is that of the training.

        Raises:  UserError: not positive multiples of the autoencoder's downscale, or too large.
        """
        default = self.default_size
        size = default[0] if height is None else height, default[1] if width is None else width
        self.autoencoder.check_image_size(size)
        check_pixels(*size)
        return size

    @property
    def default_guidance(self) -> float:
        """The guidance scale of a call that names none: the model's own, or the usual 5."""
        own = self.components.sampling.guidance_scale
        return DEFAULT_GUIDANCE if own is None else own

    def load_embedding(self, path: str | Path, token: str | None = None) -> str:
        """Teach the text encoder a word from a file of textual inversion.

        Args:    path: .safetensors, .bin or A1111's .pt, or a folder with learned_embeds.
                 token: how prompts will name it; None: as the file says, or as it is called.
        Returns: that name.
        Raises:  UserError: no such file, not for this text encoder, or a name that means
                 something already; the model is as it was.
        """
        word = read_embedding(path)
        name = word.token if token is None else token
        add_word(self.text_encoder, name, word.vectors)
        return name


OutputType = Literal["pil", "np", "pt", "latent"]


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline gives back."""

    images: Any
    """A list of PIL images; or an array (B, H, W, 3) or tensor (B, 3, H, W) in 0 … 1; or latents
    (B, C, h, w), as `output_type` asked."""
    seeds: list[int]
    """The seed of each image: give it as `seed` to get that image again."""
    prompts: list[ReadPrompt] = field(default_factory=list)
    """How each prompt was read: its tokens, its chunks, words that did not fit."""


@dataclass(frozen=True)
class _Plan:
    """How one call samples."""

    sampler: str
    grid: Tensor
    options: dict[str, Any]
    rescale: float
    interval: tuple[float, float] | None


class LatentDiffusionPipeline(LoadedModel):
    """Generates images from prompts.

    Example: `LatentDiffusionPipeline.from_pretrained()("a cat painting").images[0]`
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_syntax: PromptSyntax = "plain",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        timestep_spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        batch_size: int = 16,
        progress: bool = True,
    ) -> PipelineOutput:
        """Generate images.

        Args:    prompt: one text or several.
                 negative_prompt: what to steer away from, one for all or one for each prompt.
                 prompt_syntax: plain: what does not fit into the text encoder is cut off, with a
                 warning; long: it goes on in further chunks; a1111: so too, with weights such as
                 (red:1.3) and with BREAK, see `prompt_syntax`. For negative prompts too.
                 height, width: in pixels, multiples of the autoencoder's downscale, at most
                 `MAX_PIXELS` in all; None: the size of the training.
                 num_inference_steps: 1 … T; more is finer and slower.
                 guidance_scale: up to 1 = off; higher follows the prompt more closely; None: the
                 model's own (generation_config.json in its folder), or 5. One for all or one for
                 each prompt.
                 guidance_rescale: 0 … 1, against washed-out pictures at high guidance.
                 guidance_interval: guide only at timesteps low … high; the steps outside take half
                 the time.
                 num_images_per_prompt: images of one prompt stand next to each other.
                 sampler: a name in SAMPLERS, or what diffusers or A1111 call it ("DPM++ 2M
                 Karras"); None: as the model's folder says.
                 sampler_options: for the sampler, for example {"eta": 1.0} for ddim.
                 timestep_spacing: a name in SPACINGS; None: as the sampler or the folder says.
                 timesteps: your own, decreasing, instead of num_inference_steps and a spacing.
                 seed: of the first image, image k has seed + k, below 2^64; None: drawn, see
                 `.seeds`.
                 latents: initial noise (B, C, h, w) instead of the seeds'.
                 output_type: pil, np, pt or latent; see `PipelineOutput`.
                 batch_size: images per pass; does not change them.
                 progress: show a bar on the terminal.
        Returns: images, their seeds, and how the prompts were read.
        Raises:  UserError: any argument outside what is described here, before any work.
                 NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
        """
        prompts = prompt_list(prompt, "prompt")
        negatives = negative_prompts(negative_prompt, len(prompts))
        guidance_scale = self.default_guidance if guidance_scale is None else guidance_scale
        scales = guidance_scales(guidance_scale, len(prompts))
        warn_of_unused_negatives(negatives, scales)
        interval = guidance_interval_of(guidance_interval)
        check_share("guidance_rescale", guidance_rescale)
        check_output_type(output_type)
        check_syntax(prompt_syntax)
        for name, value in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("num_inference_steps", num_inference_steps),
            ("batch_size", batch_size),
        ):
            check_steps(name, value)
        shape = self._latent_shape(height, width)
        seeds = self._seeds(seed, len(prompts) * num_images_per_prompt)
        sampler, grid, options = self._sampling(
            sampler, sampler_options, timestep_spacing, num_inference_steps, timesteps
        )
        plan = _Plan(sampler, grid, options, guidance_rescale, interval)
        if latents is None:
            warn_of_late_start(self.schedule, grid)
        x_T = batch_noise(seeds, shape) if latents is None else latents
        check_latents(x_T, (len(seeds), *shape))
        # A1111's syntax refuses networks, and says so itself.
        warn_of_unknown_words(
            self.text_encoder.tokenizer, [*prompts, *negatives], prompt_syntax == "a1111"
        )

        read = [self.read_prompt(text, prompt_syntax) for text in prompts]
        room = self.components.sampling.chunk_tokens
        contexts = image_contexts(
            self.text_encoder,
            prompts,
            negatives,
            scales,
            num_images_per_prompt,
            prompt_syntax,
            room,
        )
        scales = [scale for scale in scales for _ in range(num_images_per_prompt)]
        found: dict[int, Tensor] = {}
        rounds = passes(contexts, batch_size)
        with _progress_bar(len(grid) * len(rounds), progress) as bar:
            for own in rounds:
                predict = self._guided(
                    batch_contexts(contexts, own), [scales[i] for i in own], plan
                )
                x_0 = self._denoise(predict, x_T[own], [seeds[i] for i in own], plan, bar)
                images = x_0 if output_type == "latent" else self.autoencoder.decode(x_0)
                found |= zip(own, images, strict=True)
        images = torch.stack([found[i] for i in range(len(seeds))])
        return PipelineOutput(to_output(images, output_type), list(seeds), read)

    def read_prompt(self, prompt: str, prompt_syntax: PromptSyntax = "a1111") -> ReadPrompt:
        """How a prompt would be read: its tokens, its chunks, words that do not fit.

        Raises:  UserError: an unknown reading, or syntax that cannot be read.
        """
        room = self.components.sampling.chunk_tokens
        return read_prompt(self.text_encoder, prompt, prompt_syntax, room)

    def invert(self, image: Any, prompt: str | Sequence[str] = "", **options: Any) -> Inversion:
        """Find the noise that DDIM turns into given pictures; arguments: `inversion.invert`."""
        return invert(self, image, prompt, **options)

    def _guided(self, contexts: list[Tensor], scales: list[float], plan: _Plan) -> Predict:
        """The guided network, the context's keys and values already projected."""
        if len(contexts) == 1 or not needs_unconditional(scales):
            return self._network(contexts[-1])
        return guide(
            self._networks(contexts),
            scales,
            rescale=plan.rescale,
            interval=plan.interval,
            predict_conditional=self._network(contexts[-1]) if plan.interval else None,
        )

    def _networks(self, contexts: list[Tensor]) -> Predict:
        """The network on the doubled batch: one pass, or one for each length of context."""
        if len({context.shape[1] for context in contexts}) == 1:
            return self._network(torch.cat(contexts))
        networks = [self._network(context) for context in contexts]

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            halves = zip(networks, x_t.chunk(2), t.chunk(2), strict=True)
            return torch.cat([network(x, level) for network, x, level in halves])

        return predict

    def _network(self, context: Tensor) -> Predict:
        kv = self.unet.project_context(context)

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return self.unet(x_t.to(self.unet.dtype), t, kv=kv).float()

        return predict

    def _denoise(
        self, predict: Predict, x_T: Tensor, seeds: Sequence[int], plan: _Plan, bar: Any
    ) -> Tensor:
        """Latents x_0 (B, C, h, w) of one chunk of images, from their noise x_T."""
        denoiser = as_denoiser(predict, self.schedule, self.prediction)
        noise = step_noise(seeds, x_T.shape[1:], self.device)
        x = x_T.to(self.device, torch.float32)
        states = run(plan.sampler, denoiser, x, self.schedule, plan.grid, noise, **plan.options)
        finite = []
        for state in states:
            x = state.x_t
            finite.append(x.isfinite().all())  # stays on the device: no step waits for it
            bar.update()
        if False in (steps := torch.stack(finite).tolist()):
            step = steps.index(False)
            where = f"step {step + 1} of {len(steps)} (timestep {float(plan.grid[step]):g})"
            raise not_finite(f"the latents after {where}", "the U-Net", self.unet)
        return x

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        down = self.autoencoder.downscale
        height, width = self.image_size(height, width)
        return self.autoencoder.latent_channels, height // down, width // down

    def _seeds(self, seed: int | None, count: int) -> list[int]:
        first = secrets.randbelow(2**31) if seed is None else check_seed(seed, count)
        return [first + k for k in range(count)]

    def _sampling(
        self,
        sampler: str | None,
        options: dict[str, Any] | None,
        spacing: str | None,
        steps: int,
        timesteps: Sequence[float] | None,
    ) -> tuple[str, Tensor, dict[str, Any]]:
        """Sampler name, grid and options, with the folder's defaults filled in."""
        defaults = self.components.sampling
        name, named_spacing = split_name(defaults.sampler if sampler is None else sampler)
        if not isinstance(options, Mapping | None):
            raise UserError(f"sampler_options must be names and values; got {options!r:.80}.")
        row, options = SAMPLERS[name], dict(options or {})
        options.setdefault("final_timestep", defaults.final_timestep(name))
        check_options(name, options)
        if timesteps is not None:
            return name, custom_grid(self.schedule, timesteps), options
        if spacing is None:
            spacing = named_spacing or row.spacing or defaults.spacing
        grid = timestep_grid(self.schedule, steps, spacing, defaults.steps_offset, style=row.grid)
        return name, grid, options


def _progress_bar(total: int, shown: bool) -> Any:
    if not shown:
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return tqdm(total=total, unit="step", leave=False)


class _NoBar:
    def update(self) -> None:
        """Do nothing."""
