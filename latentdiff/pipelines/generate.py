"""The pipeline: a model's parts, its adapters and its tasks; `task` has what the tasks share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

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
from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.folder import Components
from latentdiff.formats.model import load_model, save_model
from latentdiff.formats.scheduler import STEPS_OFFSET
from latentdiff.models.prompts import (
    PromptSyntax,
    ReadPrompt,
    add_word,
    read_prompt,
)
from latentdiff.pipelines import edit
from latentdiff.pipelines.hashes import model_name
from latentdiff.pipelines.inputs import check_pixels
from latentdiff.pipelines.inversion import Inversion, invert
from latentdiff.pipelines.lora import Loras, parts_of
from latentdiff.pipelines.task import PipelineOutput, SamplingOptions, Task, run_task
from latentdiff.sampling import Network, SamplingPlan
from latentdiff.weights import raw_bytes

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
        source = "embedded" if folder_or_hub_id is None else str(folder_or_hub_id)
        if folder_or_hub_id is None:
            if not EMBEDDED_MODEL.is_dir():
                raise UserError(
                    f"this installation holds no embedded model ({EMBEDDED_MODEL} does not exist). "
                    "Give a model folder or a Hugging Face id."
                )
            folder_or_hub_id = EMBEDDED_MODEL
        options = {"revision": revision, "variant": variant, "prediction": prediction}
        pipeline = cls(load_model(folder_or_hub_id, dtype=dtype, **options))
        pipeline.model = {"source": source, "name": model_name(source), **options}
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        **options: Unpack[SamplingOptions],
    ) -> PipelineOutput:
        """Generate images.

        Args:    prompt: one text or several.
                 height, width: in pixels, multiples of the autoencoder's downscale, at most
                 `MAX_PIXELS` in all; None: the size of the training.
                 latents: initial noise (B, C, h, w) instead of the seeds'.
                 options: steps, guidance, sampler, seed …, see `SamplingOptions`.
        Returns: images, their seeds, and how the prompts were read.
        Raises:  UserError: any argument outside what is described here, before any work.
                 NotFiniteError: text encoder, U-Net or autoencoder gave NaN or infinity.
        """
        task = Task(self.image_size(height, width))
        return run_task(self, prompt, task, latents=latents, **options)

    image_to_image = edit.image_to_image
    inpaint = edit.inpaint
    outpaint = edit.outpaint
    variations = edit.variations

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

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image at a time, which takes less memory."""
        self.autoencoder.slicing = True

    def enable_vae_tiling(self) -> None:
        """Encode and decode in bands of rows: less memory, the same pixels; see `models.bands`."""
        self.autoencoder.tiling = True

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
        if spacing is None:
            spacing = named_spacing or row.spacing or defaults.spacing
        spacing = get_spacing(spacing or usual_spacing(self.schedule))
        grid = timestep_grid(self.schedule, steps, spacing, STEPS_OFFSET, style=row.grid)
        return SamplingPlan(grid, name, options, spacing)

    def network(self, size: tuple[int, int], extra: Tensor | None = None) -> Network:
        """The U-Net as sampling uses it on images of a (height, width) in pixels.

        Args:    extra: (B, E, h, w), channels that it takes after those of x_t; None: an inpainting
                 U-Net finds everything masked, as in a quarter of its training.
        """
        if extra is None and self.unet.config.inpaints:
            extra = self.autoencoder.all_masked(size)
        return Network(self.unet, self.schedule, self.prediction, extra=extra)
