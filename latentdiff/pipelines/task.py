"""What is asked of a pipeline, and what it gives back.

A `Task` says what is made besides an image of a prompt: what it begins from, what steers it, what
becomes of the decoded images. Text to image is the task that says nothing; `call` does them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypedDict

from torch import Tensor

from latentdiff.diffusion.samplers import Denoiser
from latentdiff.errors import UserError
from latentdiff.images import check_image_file, numbered
from latentdiff.models.prompts import PromptSyntax, ReadPrompt
from latentdiff.pipelines.inputs import OutputType
from latentdiff.pipelines.metadata import write
from latentdiff.pipelines.prompt_loras import LoraFolder

if TYPE_CHECKING:
    from PIL.Image import Image

Callback = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
#: Methods of the pipeline that make images.
TASKS = (
    *("text_to_image", "image_to_image", "inpaint", "outpaint", "variations"),
    *("colorize", "restore", "upscale", "interpolate"),
)
#: Sampling steps of a call that does not say how many.
DEFAULT_STEPS = 25
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
    lora_dir: str | Path | LoraFolder | None
    """A folder of LoRA files: `<lora:fur:0.7>` in a prompt is fur.safetensors at that weight, for
    the images of that prompt, see `prompt_loras`; None: nothing is loaded."""
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
    on_progress: Callable[[Progress], None] | None
    """Called with a `Progress` after each step, as `stream` yields them; it may set
    `pipeline._interrupt` to end here."""


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
    and where it was interrupted, that of each image."""
    steps: int = 0
    """How many steps were run: those asked for, or `strength`'s share of them; the most of any
    image."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """How each image was made, as `save` writes it; see `settings.image_settings`."""
    flagged: list[bool] | None = None
    """What the safety checker says of each image; None: there is none, or the images are latents.
    They are as they were drawn all the same."""

    def only(self, k: int) -> PipelineOutput:
        """The k-th image alone."""
        own = slice(k, k + 1)
        prompt = k * len(self.prompts) // len(self.seeds)
        return replace(
            self,
            images=self.images[own],
            seeds=self.seeds[own],
            prompts=self.prompts[prompt : prompt + 1],
            settings=self.settings[own],
            flagged=self.flagged and self.flagged[own],
        )

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


Events = Iterator["Progress | PipelineOutput"]


@dataclass(frozen=True)
class Progress:
    """Where a call is after a step."""

    step: int
    """1 … total, through all passes, also those of `hires_scale`."""
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


P = ParamSpec("P")


def run_to_the_end(stream: Callable[P, Events]) -> Callable[P, PipelineOutput]:
    """Decorate what makes images and tells of each step, so that it gives its result alone."""

    @functools.wraps(stream)
    def run(*args: P.args, **options: P.kwargs) -> PipelineOutput:
        for event in stream(*args, **options):
            output = event
        assert isinstance(output, PipelineOutput)
        return output

    return run


def stream_of(method: Callable[P, PipelineOutput]) -> Callable[P, Events]:
    """What was decorated: a `Progress` after each step, then the result."""
    stream: Callable[P, Events] = method.__wrapped__  # type: ignore[attr-defined]
    return stream


class Batch(NamedTuple):
    """The images of one pass."""

    indices: list[int]
    """Which of the call's images they are."""
    prompts: list[int]
    """The number of each one's prompt."""
    seeds: list[int]


class Condition(NamedTuple):
    """What the denoiser of one image is given."""

    context: Tensor
    """(tokens, width) of its prompt."""
    negative: Tensor
    """The same of its negative prompt."""
    scale: float
    """Of guidance."""


@dataclass(frozen=True)
class Task:
    """What is made besides an image of a prompt; its functions are called pass by pass."""

    size: tuple[int, int]
    """(height, width) in pixels of what the U-Net works on."""
    start: Callable[[Batch], Tensor] | None = None
    """Latents (B, C, h, w) to begin from, with noise in `strength`'s measure; None: pure noise."""
    strength: float = 1.0
    """0 … 1, how much of the way from noise is gone: 1 begins at pure noise, 0 runs no step."""
    wrap: Callable[[Denoiser, Batch], Denoiser] | None = None
    """Steers the model's denoiser, see `diffusion.guidance`."""
    extra: Callable[[Batch], Tensor] | None = None
    """Channels (B, E, h, w) that the U-Net takes after those of x_t; None: an inpainting U-Net
    finds everything masked."""
    blend: Callable[[list[Condition]], list[Condition]] | None = None
    """Conditions of all images → those to use."""
    settle: Callable[[Tensor, Batch], Tensor] | None = None
    """Sampled latents (B, C, h, w) → those that are decoded."""
    finish: Callable[[Tensor, Batch], Tensor] | None = None
    """Decoded images (B, 3, H, W) in [−1, 1] → those of the result."""
    timesteps: Sequence[Sequence[float]] = ()
    """Those of each prompt, decreasing; none: as the call says."""
    done: int = 0
    """Steps of a task that this one goes on from, to count through both."""
    next_strength: float = 0.0
    """The strength of a task that goes on from this one, for the same."""
