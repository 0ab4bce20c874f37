"""What requests in the protocol of AUTOMATIC1111's web UI say, and what that is here.

Fields have that program's names and defaults, but sizes: one that is not said is the model's, or
the given image's. What has no equal here is named in a warning.

A mask is worked on at the size of the model's training (inpaint_full_res, the default), which
leaves the image at its own size, or with the whole image, at width × height.

Source: stable-diffusion-webui, modules/api/models.py, modules/processing.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import PIL.Image
from fastapi import HTTPException
from PIL import ImageOps
from PIL.Image import Resampling
from pydantic import BeforeValidator, Field

from latentdiff.data.images import to_grey, to_srgb
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.pipelines.image_inputs import read_masks
from latentdiff.serve.a1111_names import Given, Options, sampler_and_spacing, unknown
from latentdiff.serve.engine import TEXT_TO_IMAGE
from latentdiff.serve.requests import Server, check_size, given_image

if TYPE_CHECKING:
    from PIL.Image import Image

_Share = Annotated[float, Field(ge=0, le=1)]
_Side = Annotated[int, Field(ge=1, le=16384)]


def _listed(given: Any) -> Any:
    return [given] * bool(given) if isinstance(given, str) else given


_OneImage = Annotated[list[str], Field(max_length=1), BeforeValidator(_listed)]
#: Fields that change no image, or none without another that is in `_NEUTRAL`.
_IDLE = (
    *("do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards"),
    *("force_task_id", "comments", "script_args", "subseed", "refiner_switch_at"),
    *("image_cfg_scale", "upscaler_2", "upscale_first", "codeformer_weight"),
    "show_extras_results",
)
#: Fields without an equal here, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "restore_faces": (False,),
    "tiling": (False,),
    "refiner_checkpoint": ("", "None"),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "include_init_images": (False,),
    "initial_noise_multiplier": (1,),
    "infotext": ("",),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_second_pass_steps": (0,),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "hr_upscaler": ("Bicubic",),
    "gfpgan_visibility": (0,),
    "codeformer_visibility": (0,),
    "extras_upscaler_2_visibility": (0,),
}


class Asked(Given):
    """What requests for images have in common."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    """-1: drawn. The k-th image has seed + k."""
    sampler_name: str = ""
    sampler_index: str = "Euler"
    """Where there is no `sampler_name`."""
    scheduler: str = "Automatic"
    steps: Annotated[int, Field(ge=1)] = 50
    cfg_scale: Annotated[float, Field(ge=0, le=100)] = 7.0
    eta: _Share | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    n_iter: Annotated[int, Field(ge=1, le=1024)] = 1
    width: _Side | None = None
    height: _Side | None = None
    denoising_strength: _Share = 0.75
    override_settings: Options = Field(default_factory=Options)
    send_images: bool = True
    save_images: bool = False
    script_name: str = ""
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)

    def task(self, server: Server) -> tuple[str, dict[str, Any]]:
        """Task and arguments of `engine.Order`, as far as kinds of requests differ."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What of it has no effect, or another one than in A1111."""
        return unused(self)

    def shared(self) -> dict[str, Any]:
        """Arguments of all tasks. Raises: UserError: no such sampler or schedule."""
        sampler, schedule = self.sampler_name or self.sampler_index, self.scheduler
        name, spacing = sampler_and_spacing(sampler, schedule)
        takes_eta = self.eta is not None and "eta" in SAMPLERS[name].options
        return {
            "prompt_syntax": "a1111",
            "num_inference_steps": self.steps,
            "sampler": name,
            "timestep_spacing": spacing,
            "sampler_options": {"eta": self.eta} if takes_eta else None,
        }


class TextToImage(Asked):
    """A request for /txt2img."""

    enable_hr: bool = False
    hr_scale: Annotated[float, Field(ge=1, le=8)] = 2.0

    def task(self, server: Server) -> tuple[str, dict[str, Any]]:
        size = {"width": self.width, "height": self.height}
        if not self.enable_hr or self.hr_scale == 1:
            return TEXT_TO_IMAGE, size
        hires = {"hires_scale": self.hr_scale, "hires_strength": self.denoising_strength}
        return TEXT_TO_IMAGE, size | hires

    def notes(self) -> list[str]:
        if self.enable_hr and self.hr_scale == 1:
            return [*unused(self), "enable_hr: without effect, since hr_scale is 1"]
        return unused(self)


class ImageToImage(Asked):
    """A request for /img2img."""

    init_images: _OneImage = Field(default_factory=list)
    resize_mode: Annotated[int, Field(ge=0, le=3)] = 0
    """1: crop to the shape, 2: fill up to it with the edges' colours, else stretch."""
    mask: _OneImage = Field(default_factory=list)
    mask_blur: Annotated[int, Field(ge=0, le=256)] = 4
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] = 0
    """Begin from 0: the colours around the mask, 1: what is there, 2 and 3: noise."""
    inpaint_full_res: bool = True
    """Work on the masked area alone."""
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=16384)] = 0
    inpainting_mask_invert: bool = False

    def task(self, server: Server) -> tuple[str, dict[str, Any]]:
        if not self.init_images:
            raise HTTPException(404, "Init image not found")
        most = server.settings.max_pixels
        image = to_srgb(given_image(self.init_images[0], "init_images", most))
        size = self.width or image.width, self.height or image.height
        check_size(server.settings, *size)
        if not self.mask:
            image = resized(image, size, self.resize_mode)
            return "image_to_image", {"image": image, "strength": self.denoising_strength}
        mask = to_grey(given_image(self.mask[0], "mask", most))
        if self.inpainting_mask_invert:
            mask = ImageOps.invert(mask)
        read_masks(mask, (image.height, image.width), 1)  # checks it
        if not self.inpaint_full_res:
            mask = mask.resize(image.size, Resampling.BOX)
            image, mask = (resized(one, size, self.resize_mode) for one in (image, mask))
        return "inpaint", {
            "image": image,
            "mask_image": mask,
            "strength": 1.0 if self.inpainting_fill > 1 else self.denoising_strength,
            "fill": self.inpainting_fill == 0,
            "mask_blur": self.mask_blur,
            "padding_mask_crop": self.inpaint_full_res_padding if self.inpaint_full_res else None,
        }

    def notes(self) -> list[str]:
        notes = unused(self)
        if self.mask and self.inpainting_fill > 1 and self.denoising_strength < 1:
            notes.append("denoising_strength: taken for 1, since inpainting_fill asks for noise")
        if self.resize_mode == 3:
            notes.append("resize_mode: 3 is done as 0, in pixels")
        return notes


class Enlarging(Given):
    """What requests for larger images have in common."""

    resize_mode: Annotated[int, Field(ge=0, le=1)] = 0
    """0: by a factor, 1: to a size."""
    upscaling_resize: Annotated[float, Field(gt=0, le=8)] = 2
    upscaling_resize_w: _Side = 512
    upscaling_resize_h: _Side = 512
    upscaling_crop: bool = True
    """To that size exactly; else nothing is cut off."""
    upscaler_1: str = "None"


class EnlargeOne(Enlarging):
    """A request for /extra-single-image."""

    image: str = ""


class NamedImage(Given):
    data: str
    name: str = ""


class EnlargeSeveral(Enlarging):
    """A request for /extra-batch-images."""

    images: list[NamedImage] = Field(alias="imageList")


class ReadSettings(Given):
    """A request for /png-info."""

    image: str


def unused(asked: Given) -> list[str]:
    """Warnings of fields that have no effect."""
    notes, names, known = list[str](), list[str](), asked.known()
    for name, value in asked.others.items():
        if name in _IDLE or (name.startswith("hr_") and not getattr(asked, "enable_hr", False)):
            continue
        if name not in _NEUTRAL:
            names.append(name)
        elif value not in (*_NEUTRAL[name], known.get(name.removeprefix("hr_"))):
            notes.append(f"{name}: without effect")
    options = getattr(asked, "override_settings", Given()).others
    return [*notes, *unknown([*names, *(f"override_settings.{name}" for name in options)])]


def resized(
    image: Image, size: tuple[int, int], mode: int, kind: Any = Resampling.LANCZOS
) -> Image:
    """An image at a size (width, height); modes: see `ImageToImage`."""
    if mode == 1:
        return ImageOps.fit(image, size, kind)
    if mode != 2:
        return image.resize(size, kind)
    inside = ImageOps.contain(image, size, kind)
    pixels, beyond = np.asarray(inside), (size[1] - inside.height, size[0] - inside.width)
    edges = [(more // 2, more - more // 2) for more in beyond]
    return PIL.Image.fromarray(np.pad(pixels, [*edges, (0, 0)][: pixels.ndim], "edge"))
