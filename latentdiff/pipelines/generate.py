"""The pipeline: a model's parts, its adapters and its tasks; `task` has what the tasks share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor

from latentdiff.diffusion.samplers import (
    SAMPLERS,
    check_options,
    custom_grid,
    get_spacing,
    split_name,
    timestep_grid,
    usual_spacing,
)
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError, choice_error
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.folder import Components
from latentdiff.formats.hub import resolve_folder
from latentdiff.formats.model import load_model, save_model
from latentdiff.formats.scheduler import STEPS_OFFSET
from latentdiff.images import to_output
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.preview import apply_linear, linear_decoder
from latentdiff.models.prompts import (
    PromptSyntax,
    ReadPrompt,
    add_word,
    read_prompt,
)
from latentdiff.models.safety_checker import SafetyChecker, load_safety_checker
from latentdiff.pipelines import edit, restore, two_pass
from latentdiff.pipelines.call import stream_task
from latentdiff.pipelines.hashes import model_name
from latentdiff.pipelines.inputs import check_pixels, for_each, prompt_list, warn_of_size
from latentdiff.pipelines.interpolate import interpolate
from latentdiff.pipelines.inversion import Inversion, invert
from latentdiff.pipelines.lora import Loras, parts_of
from latentdiff.pipelines.offload import Offload
from latentdiff.pipelines.task import (
    TASKS,
    Events,
    SamplingOptions,
    Task,
    run_to_the_end,
    stream_of,
)
from latentdiff.sampling import Network, SamplingPlan
from latentdiff.weights import raw_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

#: Guidance scale when neither the caller nor the model's folder gives one.
DEFAULT_GUIDANCE = 5.0


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
        self.preview_decoder: Autoencoder | None = None
        """A tiny autoencoder (AutoencoderTiny) with this one's latents, see `preview`."""
        self._linear_decoder: Tensor | None = None
        self.safety_checker: SafetyChecker | None = None
        """Says of each image whether it shows what it should not, see `load_safety_checker`."""
        self._interrupt = False
        self._offload: Offload | None = None
        #: Learned words, as `settings` records them.
        self.embeddings: list[dict[str, Any]] = []
        #: The model, as `settings` records it; its hash is added when it is needed.
        self.model: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        variant: str | None = None,
        prediction: str | None = None,
        vae: str | Path | None = None,
    ) -> Self:
        """Load a model: a folder of diffusers' Stable Diffusion layout, or a single file.

        Args:    folder_or_hub_id: a local folder or a .safetensors or .ckpt file (never touch the
                 network), or a Hugging Face id; None: the model that comes with the package.
                 dtype: of U-Net and text encoder in memory; the autoencoder stays float32.
                 revision: branch, tag or commit on the hub.
                 variant: which weights, where there are several: fp16, non_ema.
                 prediction: eps or v instead of what the model says.
                 vae: an autoencoder instead of the model's own, see `load_model`.
        Raises:  UserError: missing, incomplete, unsupported or inconsistent.
        """
        source = "embedded" if folder_or_hub_id is None else str(folder_or_hub_id)
        if folder_or_hub_id is None:
            if not EMBEDDED_MODEL.is_dir():
                raise UserError(
                    f"this installation holds no embedded model ({EMBEDDED_MODEL} does not exist). "
                    "Give a model folder or a Hugging Face id."
                )
            folder_or_hub_id = EMBEDDED_MODEL
        options: dict[str, Any] = {"revision": revision, "variant": variant}
        options |= {"prediction": prediction, "vae": None if vae is None else str(vae)}
        pipeline = cls(load_model(folder_or_hub_id, dtype=dtype, **options))
        pipeline.model = {"source": source, "name": model_name(source), **options}
        return pipeline

    @run_to_the_end
    def text_to_image(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        hires_scale: float | None = None,
        hires_strength: float = two_pass.STRENGTH,
        **options: Unpack[SamplingOptions],
    ) -> Events:
        """Generate images; the pipeline's call.

        Args:    prompt: one text or several.
                 height, width: in pixels, multiples of the autoencoder's downscale, at most
                 `MAX_PIXELS` in all; None: the size of the training.
                 latents: initial noise (B, C, h, w) instead of the seeds'.
                 hires_scale: draw in two passes, the second so many times as wide and tall, begun
                 from the first enlarged, see `two_pass`; None: in one.
                 hires_strength: 0 … 1, how much of the way from noise the second pass goes.
                 options: steps, guidance, sampler, seed …, see `SamplingOptions`.
        Returns: images, their seeds, and how the prompts were read.
        Raises:  UserError: any argument outside what is described here, before any work.
                 NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
        """
        size = self.image_size(height, width)
        warn_of_size(
            size,
            self.default_size,
            "Leave the size out and give hires_scale (--hires-scale 2), or upscale the image.",
        )
        if hires_scale is None:
            return stream_task(self, prompt, Task(size), latents=latents, **options)
        hires = hires_scale, hires_strength
        return two_pass.stream_two_passes(self, prompt, size, *hires, latents, {**options})

    __call__ = text_to_image
    image_to_image = edit.image_to_image
    inpaint = edit.inpaint
    outpaint = edit.outpaint
    variations = edit.variations
    interpolate = interpolate
    colorize = restore.colorize
    upscale = restore.upscale
    restore = restore.restore

    def stream(
        self, prompt: str | Sequence[str], task: str = "text_to_image", **arguments: Any
    ) -> Events:
        """Generate images and look on: a `Progress` after each step, then the result.

        To stop at once, leave the loop and drop (or `close`) the generator; to have what is there,
        set `pipeline._interrupt` first.

        Args:    task: the method that makes the images.  arguments: its others.
        Raises:  as that method, and UserError: an unknown task.
        """
        if task not in TASKS:
            raise choice_error("task", task, TASKS)
        return stream_of(getattr(type(self), task))(self, prompt=prompt, **arguments)

    def preview(self, latents: Tensor) -> list[Image]:
        """Rough images of latents (B, C, h, w): `preview_decoder`'s, or as large as the latents.

        Raises:  UserError: latents of another shape, or another model's.
        """
        channels = self.autoencoder.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise UserError(
                f"latents must have the shape (images, {channels}, height, width) for this model; "
                f"got {tuple(latents.shape)}."
            )
        if self.preview_decoder is not None:
            return to_output(self.preview_decoder.decode(latents), "pil")
        if self._linear_decoder is None:
            self._linear_decoder = linear_decoder(self.autoencoder)
        return to_output(apply_linear(self._linear_decoder, latents), "pil")

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

    def load_safety_checker(self, name: str | Path) -> None:
        """Have images checked; `PipelineOutput.flagged` says of which, and nothing is blackened.

        Args:    name: a folder or Hugging Face id of Stable Diffusion's safety checker, such as
                 CompVis/stable-diffusion-safety-checker, or of a model that has one.
        Raises:  UserError: there is none.
        """
        self.safety_checker = load_safety_checker(resolve_folder(name)).to(self.device)

    def set_adapters(
        self, names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0
    ) -> None:
        """Use these loaded LoRA files at these strengths, and no others, without reloading any.

        Args:    names: of one file or several.  adapter_weights: one for all or one each.
        Raises:  UserError: a name that is not loaded, another number of weights, or fused files.
        """
        chosen = prompt_list(names, "names")
        given = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights]
        weights = for_each(list(given), len(chosen), "adapter_weights", "number", "names")
        self.loras.set_strengths(dict(zip(chosen, weights, strict=True)))

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
        if device is not None and self._offload is not None:
            self._offload.remove()
            self._offload = None
        self.unet.to(device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        self.autoencoder.to(device=device)
        if self.safety_checker is not None:
            self.safety_checker.to(device=device)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep the parts on the CPU and each on the device only while it computes; `to` ends it.

        Args:    device: None: cuda or mps, whichever there is.
        Raises:  UserError: there is none.
        """
        if device is None and not torch.accelerator.is_available():
            raise UserError(
                "enable_model_cpu_offload needs another device than the CPU (cuda, mps), and this "
                "machine has none; leave it out."
            )
        self.to("cpu")
        chosen = torch.accelerator.current_accelerator() if device is None else device
        self._offload = Offload(self, torch.device(chosen or "cpu"))

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image at a time, which takes less memory."""
        self.autoencoder.slicing = True

    def enable_vae_tiling(self) -> None:
        """Encode and decode in bands of rows: less memory, the same pixels; see `models.bands`."""
        self.autoencoder.tiling = True

    @property
    def device(self) -> torch.device:
        """Where the U-Net computes."""
        return self.unet.device if self._offload is None else self._offload.device

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

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of `size`, (height, width)."""
        down = self.autoencoder.downscale
        return self.autoencoder.latent_channels, size[0] // down, size[1] // down

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
        hashed = hashlib.sha256(raw_bytes(word.vectors)).hexdigest()[:10]
        self.embeddings.append({"file": str(path), "token": name, "hash": hashed})
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
        usual = named_spacing or row.spacing or defaults.spacing or usual_spacing(self.schedule)
        spacing = get_spacing(usual if spacing is None else spacing)
        grid = timestep_grid(self.schedule, steps, spacing, STEPS_OFFSET, style=row.grid)
        return SamplingPlan(grid, name, options, spacing)

    @property
    def network(self) -> Network:
        """The U-Net as sampling uses it, on its device."""
        if self._offload is not None:
            self._offload.bring("unet")
        return Network(self.unet, self.schedule, self.prediction, device=self.device)

    def network_for(self, size: tuple[int, int], extra: Tensor | None = None) -> Network:
        """The same for images of a (height, width) in pixels.

        Args:    extra: (B, E, h, w), channels that the U-Net takes after those of x_t; None: where
                 it inpaints, those of an image with everything masked.
        """
        if extra is None and self.unet.config.inpaints:
            extra = self.autoencoder.all_masked(size)
        return replace(self.network, extra=None if extra is None else extra.to(self.device))
