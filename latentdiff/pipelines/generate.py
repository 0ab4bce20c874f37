"""Text to image: prompt → context → latents → image.

    c = text_encoder(prompt),  x_T ~ N(0, I),  x_0 = sampler(unet, x_T, c),  image = decode(x_0)

Images are sampled several at a time. A prompt of several chunks has a longer context than others;
padding the shorter ones would change what cross-attention sees, and so an image by what stands
beside it. Instead the images of one pass have contexts of the same lengths (`passes`).

Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.samplers import (
    SAMPLERS,
    check_options,
    custom_grid,
    split_name,
    timestep_grid,
    warn_of_late_start,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.folder import Components
from latentdiff.formats.model import load_model, save_model
from latentdiff.formats.scheduler import STEPS_OFFSET
from latentdiff.images import to_output
from latentdiff.models.finite import check_finite
from latentdiff.models.known_things import warn_of_unknown_things
from latentdiff.models.prompts import (
    PromptSyntax,
    ReadPrompt,
    add_word,
    encode_prompts,
    read_prompt,
    warn_of_unknown_words,
)
from latentdiff.pipelines.inputs import (
    OutputType,
    check_counts,
    check_latents,
    check_output_type,
    check_pixels,
    check_seed,
    check_share,
    for_each,
    guidance_interval_of,
    guidance_scales,
    prompt_list,
    warn_of_unused_negatives,
)
from latentdiff.pipelines.inversion import Inversion, invert
from latentdiff.pipelines.lora import Loras, parts_of
from latentdiff.sampling import Network, SamplingPlan, build_denoiser, sample_latents

#: Guidance scale when neither the caller nor the model's folder gives one.
DEFAULT_GUIDANCE = 5.0


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


class Condition(NamedTuple):
    """What the denoiser of one image is given."""

    context: Tensor
    """(tokens, width) of its prompt."""
    negative: Tensor
    """The same of its negative prompt."""
    scale: float
    """Of guidance."""


class LatentDiffusionPipeline:
    """Generates images from prompts.

    Example: `LatentDiffusionPipeline.from_pretrained()("a cat painting").images[0]`
    """

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
                 (red:1.3) and with BREAK, see `prompts.parse`. For negative prompts too.
                 height, width: in pixels, multiples of the autoencoder's downscale, at most
                 `MAX_PIXELS` in all; None: the size of the training.
                 num_inference_steps: 1 … T; more is finer and slower.
                 guidance_scale: up to 1 = off; higher follows the prompt more closely; None: the
                 model's own (generation_config.json in its folder), or 5. One for all or one for
                 each prompt.
                 guidance_rescale: 0 … 1, against washed-out images at high guidance.
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
        negative = "" if negative_prompt is None else negative_prompt
        negatives = prompt_list(negative, "negative_prompt")
        negatives = for_each(negatives, len(prompts), "negative_prompt", "text")
        scale = self.default_guidance if guidance_scale is None else guidance_scale
        scales = guidance_scales(scale, len(prompts))
        warn_of_unused_negatives(negatives, scales)
        interval = guidance_interval_of(guidance_interval)
        check_share("guidance_rescale", guidance_rescale)
        check_output_type(output_type)
        read = {text: self.read_prompt(text, prompt_syntax) for text in [*prompts, *negatives]}
        check_counts(
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
        )

        shape = self._latent_shape(height, width)
        count = len(prompts) * num_images_per_prompt
        first = secrets.randbelow(2**31) if seed is None else check_seed(seed, count)
        seeds = [first + k for k in range(count)]
        plan = self.sampling_plan(
            num_inference_steps,
            sampler=sampler,
            options=sampler_options,
            spacing=timestep_spacing,
            timesteps=timesteps,
        )
        if latents is None:
            warn_of_late_start(self.schedule, plan.timesteps)
        x_T = batch_noise(seeds, shape) if latents is None else latents
        check_latents(x_T, (len(seeds), *shape))
        warn_of_unknown_words(self.text_encoder.tokenizer, read, prompt_syntax == "a1111")
        known = self.components.sampling.known_things
        warn_of_unknown_things(self.text_encoder, prompts, known)

        context = dict(zip(read, self._encode(list(read.values())), strict=True))
        conditions = [
            Condition(context[own], context[negative], scale)
            for own, negative, scale in zip(prompts, negatives, scales, strict=True)
            for _ in range(num_images_per_prompt)
        ]
        guidance = {"rescale": guidance_rescale, "interval": interval}
        decode = output_type != "latent"
        images = self._sample(
            conditions, x_T, seeds, plan, guidance, batch_size, decode=decode, progress=progress
        )
        return PipelineOutput(to_output(images, output_type), seeds, [read[p] for p in prompts])

    def read_prompt(self, prompt: str, prompt_syntax: PromptSyntax = "a1111") -> ReadPrompt:
        """How a prompt would be read: its tokens, its chunks, words that do not fit.

        Raises:  UserError: an unknown syntax, or one that cannot be read.
        """
        room = self.components.sampling.chunk_tokens
        return read_prompt(self.text_encoder, prompt, prompt_syntax, room)

    def invert(self, image: Any, prompt: str | Sequence[str] = "", **options: Any) -> Inversion:
        """Find the noise that DDIM turns into given images; arguments: `inversion.invert`."""
        return invert(self, image, prompt, **options)

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
        """Add the attached LoRA files to the weights: the same images, no more to compute."""
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

    def sampling_plan(
        self,
        steps: int,
        *,
        sampler: str | None = None,
        options: dict[str, Any] | None = None,
        spacing: str | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> SamplingPlan:
        """Sampler, grid and options of a call, with the folder's defaults filled in.

        Args:    see `__call__`.
        Raises:  UserError: an unknown name or option, or a grid that the schedule does not have.
        """
        defaults = self.components.sampling
        name, named_spacing = split_name(defaults.sampler if sampler is None else sampler)
        if not isinstance(options, Mapping | None):
            raise UserError(f"sampler_options must be names and values; got {options!r:.80}.")
        options = {"final_timestep": defaults.final_timestep(name), **(options or {})}
        check_options(name, options)
        if timesteps is not None:
            return SamplingPlan(custom_grid(self.schedule, timesteps), name, options)
        row = SAMPLERS[name]
        if spacing is None:
            spacing = named_spacing or row.spacing or defaults.spacing
        grid = timestep_grid(self.schedule, steps, spacing, STEPS_OFFSET, style=row.grid)
        return SamplingPlan(grid, name, options)

    @property
    def network(self) -> Network:
        """The U-Net as sampling uses it."""
        return Network(self.unet, self.schedule, self.prediction)

    def _encode(self, prompts: Sequence[ReadPrompt]) -> list[Tensor]:
        encoder = self.text_encoder
        states = encode_prompts(encoder, prompts)
        check_finite(torch.cat(states), "its states", "the text encoder", encoder.module)
        return states

    def _sample(
        self,
        conditions: Sequence[Condition],
        x_T: Tensor,
        seeds: Sequence[int],
        plan: SamplingPlan,
        guidance: Mapping[str, Any],
        batch_size: int,
        *,
        decode: bool,
        progress: bool,
    ) -> Tensor:
        """Images in [−1, 1], or latents, of the noise x_T.

        Args:    conditions, x_T, seeds: one per image.  guidance: options of `build_denoiser`.
        """
        rounds, found = passes(conditions, batch_size), dict[int, Tensor]()
        total = len(plan.timesteps) * len(rounds)
        with tqdm(total=total, unit="step", leave=False, disable=not progress) as bar:
            for batch in rounds:
                contexts, negatives, scales = zip(*(conditions[k] for k in batch), strict=True)
                stacked = torch.stack(contexts), torch.stack(negatives)
                denoiser = build_denoiser(self.network, *stacked, scales, **guidance)
                noise, own_seeds = x_T[batch], [seeds[k] for k in batch]
                x_0 = sample_latents(self.network, denoiser, noise, own_seeds, plan, bar.update)
                found |= zip(batch, self.autoencoder.decode(x_0) if decode else x_0, strict=True)
        return torch.stack([found[k] for k in range(len(conditions))])

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        down = self.autoencoder.downscale
        height, width = self.image_size(height, width)
        return self.autoencoder.latent_channels, height // down, width // down


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
