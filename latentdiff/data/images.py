"""Any image file becomes 8-bit RGB, upright and opaque, then the tensor the autoencoder sees.

Or an error with the image's name, and what the file really holds. A mask says which parts of an
image count in the loss: white ones do, black ones do not, grey ones in part. It is a grey image
of the same size, from the image's own transparency or from a file of its own. It is cut as the
image is and kept beside the moments, averaged over the pixels that one latent position stands
for.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UserError, choice_error
from latentdiff.sniff import HEAD, sniff

T = TypeVar("T")
Source = str | os.PathLike[str] | bytes | Image.Image
RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
#: File name endings that are looked for in folders.
IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm",
)  # fmt: skip

#: How usual profiles of sRGB call themselves: there is nothing to convert.
SRGB_PROFILES = ("sRGB", "sRGB IEC61966-2.1", "sRGB IEC61966-2-1 black scaled", "sRGB built-in")
#: Images with more pixels are decoded one at a time.
LARGE_PIXELS = 25_000_000
#: Pixels that are calculated with at a time, at 8 bytes each.
_STRIP_PIXELS = 2**18
_ONE_AT_A_TIME = threading.Lock()


class UnreadableImage(Exception):  # noqa: N818  (a fact about the data, not a fault of the program)
    """An image that cannot be used: its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def display_name(path: str | bytes | os.PathLike[str]) -> str:
    r"""Write a path as valid UTF-8; bytes that are not become \xNN, so names stay distinct.

    Raw names from a file system may hold anything, and JSON and Arrow refuse what is not UTF-8.
    """
    try:
        raw = os.fsencode(path)
    except UnicodeEncodeError:  # half of a surrogate pair, which a table may hold
        raw = os.fspath(path).encode("utf-8", "backslashreplace")  # type: ignore[union-attr]
    return raw.decode("utf-8", "backslashreplace")


def open_image(
    source: str | os.PathLike[str] | bytes, name: str | None = None, background: RGB = WHITE
) -> Image.Image:
    """Decode an image to 8-bit RGB as a viewer would show it.

    EXIF rotation is applied, colours are brought to sRGB from the embedded profile, transparency is
    composited over `background`; grey, palette, CMYK and 16-bit images are converted; of an
    animation or a multi-page file the first frame is taken.

    Args:
        source: a path, or the bytes of a file.
        name: how messages call it; the path by default.
    Raises: UnreadableImage: missing, empty, truncated, corrupt, too large, or not an image.
    """
    return decode(source, name, lambda image: to_rgb(image, background))


def open_with_alpha(
    source: str | os.PathLike[str] | bytes, name: str | None = None, background: RGB = WHITE
) -> tuple[Image.Image, Image.Image | None]:
    """Decode an image as `open_image` does; also its opacity in grey, None if full."""
    return decode(source, name, lambda image: (to_rgb(image, background), _alpha(image)))


def open_grey(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Decode an image to 8-bit grey, see `to_grey` and `open_image`."""
    return decode(source, name, to_grey)


def to_grey(image: Image.Image) -> Image.Image:
    """Luminance times opacity. The values are weights, not colours: a profile changes nothing."""
    image.info.pop("icc_profile", None)
    return to_rgb(image, (0, 0, 0)).convert("L")


def _alpha(image: Image.Image) -> Image.Image | None:
    """Opacity in grey; None where all is opaque."""
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # one grey of 16 bits is transparent; Pillow compares 8
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(np.uint8(255) * opaque)
    return image.convert("RGBA").getchannel("A")


def decode(
    source: Source,
    name: str | None,
    use: Callable[[Image.Image], T],
    check: Callable[[Image.Image], None] = lambda image: None,
) -> T:
    """What `use` makes of an image, upright and of any Pillow mode.

    Args:    source: a path, the bytes of a file, or a Pillow image, which stays as it is.
             name: how messages call it; the path by default.
             check: is shown the image before its pixels are read, and may refuse it.
    Raises:  UnreadableImage: see `open_image`.
    """
    held = isinstance(source, bytes | Image.Image)
    label = name or ("image" if held else display_name(source))  # type: ignore[arg-type]
    if source == b"":
        raise UnreadableImage(label, "the file is empty")
    try:
        with _opened(source, label) as image:
            check(image)
            _shorten_colour_key(image)
            image.load()
            return use(_upright(image, in_place=image is not source))
    except Image.DecompressionBombError as error:
        raise UnreadableImage(
            label,
            f"too large to decode safely ({error}). Shrink the image, or if you trust it raise "
            "PIL.Image.MAX_IMAGE_PIXELS",
        ) from error
    except FileNotFoundError as error:
        raise UnreadableImage(label, "the file does not exist") from error
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(label, _what_else(source)) from error
    except (UnreadableImage, UserError):
        raise
    except Exception as error:  # a decoder fed with broken data raises nearly anything
        raise UnreadableImage(
            label, f"cannot be decoded ({error or type(error).__name__})"
        ) from error


def _what_else(source: Source) -> str:
    """Say what a file is instead of an image."""
    head = b""
    if isinstance(source, bytes):
        head = source[:HEAD]
    elif not isinstance(source, Image.Image):
        with suppress(OSError), open(source, "rb") as file:
            head = file.read(HEAD)
    if not (head and (found := sniff(head))):
        return "not an image format that Pillow reads" if head else "the file is empty"
    what, advice = found
    return f"not an image but {what}" + f"; {advice[:1].lower()}{advice[1:]}" * bool(advice)


@contextmanager
def _opened(source: Source, label: str) -> Iterator[Image.Image]:
    """Open an image's header; large ones are let through one at a time, as each takes gigabytes.

    Raises: UnreadableImage: PostScript, which Pillow would have another program run.
    """
    if isinstance(source, Image.Image):
        yield source
        return
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else Path(source)) as image:
        if image.format == "EPS":
            raise UnreadableImage(label, "PostScript is a program, and is not run")
        with _ONE_AT_A_TIME if image.width * image.height > LARGE_PIXELS else nullcontext():
            yield image


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to sRGB: RGBA where some of it may be transparent, else RGB."""
    profile, opacity = image.info.get("icc_profile"), _alpha(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    colours = _in_srgb(image, profile) if profile else _colours(image, "RGB")
    if opacity is not None:
        colours.putalpha(opacity)
    return colours


def to_rgb(image: Image.Image, background: RGB = WHITE) -> Image.Image:
    """Convert any Pillow mode to sRGB, compositing transparency over `background`."""
    colours = to_srgb(image)
    if colours.mode == "RGB":
        return colours
    behind = Image.new("RGBA", colours.size, (*background, 255))
    return Image.alpha_composite(behind, colours).convert("RGB")


def _colours(image: Image.Image, mode: str) -> Image.Image:
    """An image without its opacity."""
    # Of a palette with transparency not every entry goes to RGB directly.
    return (image.convert("RGBA") if image.has_transparency_data else image).convert(mode)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as an ICC profile means them; as they are where it is sRGB or of no use."""
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space]
        of_another_kind = space != mode and (space, mode) != ("RGB", "L")
        if of_another_kind or ImageCms.getProfileDescription(source).strip() in SRGB_PROFILES:
            return _colours(image, "RGB")
        target, plain = ImageCms.createProfile("sRGB"), _colours(image, space)
        shown = ImageCms.profileToProfile(plain, source, target, outputMode="RGB")
        return _colours(shown or plain, "RGB")
    except Exception:  # a broken profile beside good pixels
        return _colours(image, "RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey (0…65535) to 8 bit; floats count as 0…1 when none exceeds 1.

    Pillow's own conversion clips at 255 and turns nearly every 16-bit image white.
    """
    values = np.asarray(image)
    rows = max(1, _STRIP_PIXELS // max(1, image.width))
    strips = [slice(row, row + rows) for row in range(0, image.height, rows)]

    def finite(strip: slice) -> Any:
        return np.nan_to_num(values[strip].astype(np.float64))

    scale = 255.0 / 65535.0
    if image.mode == "F":
        most = max((finite(s).max(initial=0.0) for s in strips), default=0.0)
        scale = 255.0 if most <= 1.0 else 1.0 if most <= 255.0 else scale
    grey = np.empty(values.shape, np.uint8)
    for strip in strips:
        grey[strip] = np.clip(np.rint(finite(strip) * scale), 0, 255)
    return Image.fromarray(grey)


def _shorten_colour_key(image: Image.Image) -> None:
    """Of 16-bit colours Pillow keeps the upper 8 bits, but not of the one that is transparent."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and any(
        "16" in str(tile.args) for tile in getattr(image, "tile", ())
    ):
        image.info["transparency"] = tuple(part >> 8 for part in key)


def _upright(image: Image.Image, *, in_place: bool) -> Image.Image:
    with suppress(Exception):  # broken EXIF beside good pixels: keep the pixels as they are
        if not in_place:
            return ImageOps.exif_transpose(image)
        ImageOps.exif_transpose(image, in_place=True)  # else it copies what is upright, too
    return image if in_place else image.copy()


Crop = Literal["center", "random", "pad"]
#: Raise it when the pixels of `open_image` or `fit` change: cached latents are then encoded anew.
TRANSFORM_VERSION = 2


def fit(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: Crop = "center",
    *,
    background: RGB = WHITE,
    generator: torch.Generator | None = None,
) -> Image.Image:
    """Bring an image to `size` pixels without distorting it, with an antialiased Lanczos filter.

    Args:
        size: side of a square, or (height, width).
        crop: "center" or "random" cuts what sticks out; "pad" keeps all and fills with background.
        generator: source of the random position; the global one by default.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if crop == "pad":
        return _pad(image, height, width, background)
    if crop not in ("center", "random"):
        raise choice_error("crop", crop, ("center", "random", "pad"))
    scale = max(width / image.width, height / image.height)
    box_w, box_h = min(width / scale, image.width), min(height / scale, image.height)
    at = torch.rand(2, generator=generator).tolist() if crop == "random" else (0.5, 0.5)
    left = float(int((image.width - box_w) * at[0]))
    top = float(int((image.height - box_h) * at[1]))
    box = (left, top, left + box_w, top + box_h)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def to_tensor(
    image: Image.Image,
    size: int | tuple[int, int],
    crop: Crop = "center",
    *,
    background: RGB = WHITE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fit an image and turn it into a tensor (see `fit` for the arguments).

    Returns: float32 (3, height, width), 0 → −1 and 255 → 1.
    """
    fitted = fit(image, size, crop, background=background, generator=generator)
    pixels = torch.from_numpy(np.array(fitted.convert("RGB"), dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _pad(image: Image.Image, height: int, width: int, background: RGB) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height), background)
    resized = image.resize(inner, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


BLACK = (0, 0, 0)


def latent_mask(
    mask: Image.Image | None,
    image_size: tuple[int, int],
    size: tuple[int, int],
    crop: Crop,
    latent: tuple[int, int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask at latent resolution.

    Args:
        mask: of any size (it is stretched to the image's); None counts everything.
        image_size: (width, height) of the image.
        size: (height, width) that the image is brought to; what padding adds does not count.
        latent: (h, w) of the latents.
        generator: source of the random position, in the state that the image's had.
    Returns: float32 (h, w) in [0, 1].
    """
    whole = mask.convert("L") if mask is not None else Image.new("L", image_size, 255)
    if whole.size != image_size:
        whole = whole.resize(image_size, Image.Resampling.BILINEAR)
    grey = whole.convert("RGB")
    pixels = to_tensor(grey, size, crop, background=BLACK, generator=generator)[:1]  # (1, H, W), ±1
    return F.adaptive_avg_pool2d((pixels[None] + 1) / 2, latent)[0, 0].clamp(0, 1)
