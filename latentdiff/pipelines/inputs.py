"""Checks of what callers of a pipeline give, before any work is done.

Without heavy imports, so that scripts check their arguments before they load a model.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from latentdiff.errors import UserError, choice_error, warn

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
OutputType = Literal["pil", "np", "pt", "latent"]
#: Height times width; eight times as wide and tall as what Stable Diffusion was trained on. Memory
#: grows with the pixels in the decoder, and with their square in attention on some machines: a slip
#: such as 100000 for 1000 would take the whole machine down instead of ending with a message.
MAX_PIXELS = 4096 * 4096
#: Above so many times the training's pixels, a model draws things twice, in part or whole: the
#: embedded one, trained at 64 x 64, does at 80 x 80 (and at 64 x 96, not above it); Stable
#: Diffusion 1, of 512 x 512, is said to at 768 x 768, and is much used at 512 x 768.
LARGE = 1.5

#: The largest number that a float holds: `is_number(x, most=FINITE)` is False for infinity.
FINITE = sys.float_info.max


def is_number(value: Any, kind: Any = int | float, most: float = math.inf) -> bool:
    """Whether a value is a number of a kind and size; NaN is none, nor are True and False."""
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= most


def check_pixels(height: int, width: int, name: str = "height x width") -> None:
    """Refuse sizes that no model draws and no memory holds.

    Args:    name: what the caller calls the size.
    Raises:  UserError: a side below 1, or more than `MAX_PIXELS`.
    """
    if min(height, width) < 1:
        raise UserError(f"{name} must be at least 1 in both directions; got {height}x{width}.")
    if height * width > MAX_PIXELS:
        raise UserError(
            f"{name} must be at most {MAX_PIXELS:,} pixels in all, such as 4096x4096; got "
            f"{height}x{width}, {height * width:,} pixels. Draw near the size of the training and "
            "enlarge the image afterwards."
        )


def prompt_list(prompt: Any, name: str) -> list[str]:
    """One text or several, as a list. Raises: UserError: anything else, or nothing."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name} must be a text or a list of texts; got {prompt!r:.200}.")
    if not texts:
        raise UserError(f"{name} must hold at least one text; got an empty list.")
    return list(texts)


def for_each(values: list[T], count: int, name: str, kind: str, of: str = "prompts") -> list[T]:
    """Repeat a single value, or take one for each. Raises: UserError: another number of them."""
    if len(values) not in (1, count):
        raise UserError(
            f"{name} must be one {kind} or one for each of the {count} {of}; got {len(values)}."
        )
    return values * count if len(values) == 1 else values


def warn_of_unused_negatives(negatives: Sequence[str], scales: Sequence[float]) -> None:
    """Warn of negative prompts of images whose guidance is off.

    Args:    negatives, scales: one for each prompt.
    """
    unused = [n for n, scale in zip(negatives, scales, strict=True) if n.strip() and scale <= 1]
    if unused:
        warn(
            f"the negative prompt {unused[0]!r:.60} does nothing: a guidance_scale of 1 or less "
            "switches guidance off. Raise it above 1, or leave the negative prompt out.",
            *unused,
        )


def guidance_scales(scale: Any, count: int) -> list[float]:
    """The guidance scale of each prompt. Raises: UserError: not numbers >= 0, another number."""
    scales = list(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else [scale]
    for value in scales:
        if not is_number(value, most=FINITE) or value < 0:
            raise UserError(
                f"guidance_scale must be a number of at least 0 (up to 1 = off, 3 to 8 usual); "
                f"got {value!r}."
            )
    return for_each(scales, count, "guidance_scale", "number")


def guidance_interval_of(interval: Any) -> tuple[float, float] | None:
    """(low, high) timesteps, or None. Raises: UserError: anything else."""
    if interval is None:
        return None
    numbers = isinstance(interval, Sequence) and all(map(is_number, interval))
    if not numbers or len(interval) != 2 or interval[0] > interval[1]:
        raise UserError(
            f"guidance_interval must be two timesteps (low, high), low <= high; got {interval!r}."
        )
    return interval[0], interval[1]


def check_counts(**counts: Any) -> None:
    """Refuse a count that is not a whole number >= 1; the keywords are the names."""
    for name, value in counts.items():
        if not is_number(value, int) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1; got {value!r}.")


def check_whole(most: int = MAX_PIXELS, /, **pixels: Any) -> None:
    """Refuse what is not a whole number of pixels in 0 … most; the keywords are the names."""
    for name, value in pixels.items():
        if not is_number(value, int, most) or value < 0:
            raise UserError(
                f"{name} must be a whole number of pixels in 0 … {most}; got {value!r:.80}."
            )


def warn_of_size(size: tuple[int, int], trained: tuple[int, int], advice: str) -> None:
    """Warn of a (height, width) that the U-Net sees at once and that is much above the training's.

    Args:    advice: what to do instead, a sentence.
    """
    if size[0] * size[1] > LARGE * trained[0] * trained[1]:
        warn(
            f"{size[0]}x{size[1]} pixels (height x width) are much more than the {trained[0]}x"
            f"{trained[1]} of the model's training: things may be drawn twice. {advice}"
        )


def check_seed(seed: Any, count: int) -> int:
    """Refuse the seed of the first of `count` images unless all have one in 0 … 2⁶⁴ − 1."""
    most = 2**64 - count
    if not is_number(seed, int) or not 0 <= seed <= most:
        below = "2^64 - 1" if count == 1 else f"2^64 - {count}, the number of images"
        raise UserError(
            f"seed must be a whole number from 0 to {below}; got {seed!r:.80}. Leave it out to "
            "have one drawn."
        )
    return seed


def seeds_of(seed: Any, count: int) -> list[int]:
    """The seed of each image, where one is the first one's and None is drawn. Raises: UserError."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise UserError(f"seed must be one, or one for each image ({count}); got {len(seed)}.")
        return [check_seed(each, 1) for each in seed]
    first = secrets.randbelow(2**31) if seed is None else check_seed(seed, count)
    return [first + k for k in range(count)]


def check_share(name: str, value: Any) -> None:
    """Refuse what is not a number in 0 … 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise UserError(f"{name} must be a number in 0 … 1; got {value!r:.80}.")


def check_output_type(given: Any) -> None:
    """Refuse an unknown output_type."""
    if given not in get_args(OutputType):
        raise choice_error("output_type", given, get_args(OutputType))


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Refuse initial latents of another shape, or that are not finite."""
    import torch  # late: --help is instant

    from latentdiff.models.finite import is_finite

    if not isinstance(latents, torch.Tensor):
        raise UserError(f"latents must be a tensor {shape}; got {latents!r:.80}.")
    if tuple(latents.shape) != shape:
        raise UserError(
            f"latents must have the shape (images, channels, height, width) = {shape} for this "
            f"prompt, size and model; got {tuple(latents.shape)}."
        )
    if not is_finite(latents):
        raise UserError("latents must be finite; the given ones hold NaN or infinity.")


def device_of(given: str | None) -> torch.device:
    """The device that --device names, or the best there is. Raises: UserError: no such device."""
    import torch  # late: --help is instant

    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {given} cannot be used here ({str(error).splitlines()[0]}). Leave --device "
            "out, or take one that this machine has: cpu, cuda, cuda:1, mps."
        ) from error
    return device
