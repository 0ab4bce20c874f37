"""Tasks that are given a measurement of an image: its grey, a smaller, blurred or noisy copy.

Each is a `Task` of the one core whose denoiser is corrected by the measurement at every step
(`diffusion.guidance.measurement`); the result is then brought to agree with it to 8 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.colour import to_lab, with_lightness
from latentdiff.diffusion.guidance.measurement import agree, ddnm
from latentdiff.diffusion.guidance.tiled import tiled
from latentdiff.diffusion.operators import Blur, Downsample, Grey, Identity, Jpeg, Operator
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.errors import UserError, choice_error
from latentdiff.pipelines.edit import _own, _prompts, _size
from latentdiff.pipelines.inputs import check_pixels, is_number
from latentdiff.pipelines.masks import padded
from latentdiff.pipelines.pictures import PictureInput, Pictures, read_pictures
from latentdiff.pipelines.task import Batch, PipelineOutput, SamplingOptions, Task, run_task

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

Kind = Literal["denoise", "deblur", "jpeg"]
#: Deviation of what rounding to 8 bit does, of images in [−1, 1].
ROUNDING = 2 / 255 / 12**0.5


def colorize(
    pipeline: LatentDiffusionPipeline,
    image: PictureInput,
    prompt: str | Sequence[str] = "",
    **options: Unpack[SamplingOptions],
) -> PipelineOutput:
    """Give grey images colours.

    Args:    image: see `image_to_image`; colours that it has do not count.
             prompt: what it shows, one text or one for each image; names of colours help.
    Returns: images of the size given, whose CIELAB lightness is the input's.
    """
    pictures = read_pictures(image)
    lightness = to_lab(pictures.rgb / 2 + 0.5)[:, :1]
    grey = with_lightness(torch.zeros_like(pictures.rgb), lightness).float() * 2 - 1

    def finish(images: Tensor, own: list[int]) -> Tensor:
        return with_lightness(images / 2 + 0.5, lightness[own].to(images.device)).float() * 2 - 1

    return _restored(pipeline, prompt, pictures, Grey(), Grey().apply(grey), 0, finish, options)


def restore(
    pipeline: LatentDiffusionPipeline,
    image: PictureInput,
    kind: Kind = "denoise",
    prompt: str | Sequence[str] = "",
    *,
    noise: float = 0.1,
    blur: float = 1.5,
    quality: int = 30,
    **options: Unpack[SamplingOptions],
) -> PipelineOutput:
    """Remove noise, blur or the traces of JPEG.

    Args:    image: see `image_to_image`.  prompt: what it shows.
             kind: denoise: takes Gaussian noise off; what it takes has that deviation.
             deblur: the result, blurred, is the input to 1/255.
             jpeg: the result, compressed, has nearly the input's coefficients.
             noise: its deviation, of colours in 0 … 1.  blur: the Gaussian's deviation in pixels.
             quality: that the file was written with, as Pillow and libjpeg count.
    Returns: images of the size given.
    """
