"""Images as users hold them: tensors → PIL and NumPy, grids, and files.

What cannot be written is refused before sampling (`check_image_file`), and no image that was made
is lost (`save_image`). Imports nothing heavy, so that scripts check their arguments at once.
"""

from __future__ import annotations

import io
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, warn, whole_text
from latentdiff.files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def to_output(images: Tensor, output_type: str) -> Any:
    """Convert images (B, 3, H, W) in [−1, 1]; latents pass through.

    Returns: pil: list of PIL images; np: (B, H, W, 3) in 0 … 1; pt: (B, 3, H, W) in 0 … 1;
             latent: the tensor as it is.
    """
    if output_type == "latent":
        return images
    unit = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return unit
    return unit.cpu().permute(0, 2, 3, 1).numpy() if output_type == "np" else to_pil(unit)


def to_pil(unit: Tensor) -> list[Image]:
    """PIL images of (B, 3, H, W) in 0 … 1, rounded to 8 bit."""
    from PIL import Image

    pixels = (unit * 255).round().byte().cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B, 3, H, W) in 0 … 1, in dB: (B,)."""
    return -10 * (images - reference).square().flatten(1).mean(1).log10()


def grid(
    images: Sequence[Image], columns: int | None = None, gap: int = 2, border: int = 0
) -> Image:
    """One image of several of equal size, row by row on white.

    Args:    columns: None for about as many as rows.  gap, border: pixels between images, and
             around all.
    Raises:  UserError: columns below 1.
    """
    from PIL import Image

    columns = math.ceil(len(images) ** 0.5) if columns is None else columns
    if columns < 1:
        raise UserError(f"columns must be at least 1; got {columns}.")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].width + gap, images[0].height + gap
    margin = 2 * border - gap
    canvas = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    for k, image in enumerate(images):
        row, column = divmod(k, columns)
        canvas.paste(image, (border + column * width, border + row * height))
    return canvas


def contact_sheet(files: Sequence[Path], columns: int | None = None, most: int = 128) -> Image:
    """One image of the images of files, none of them enlarged.

    Args:    columns: as `grid` has it.  most: the longer side of each, in pixels.
    """
    from PIL import Image

    small: list[Image.Image] = []
    for file in files:
        with Image.open(file) as opened:
            opened.thumbnail((most, most))
            small.append(opened.convert("RGB"))
    side = max(max(image.size) for image in small)
    cells = [Image.new("RGB", (side, side), "white") for _ in small]
    for cell, image in zip(cells, small, strict=True):
        cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return grid(cells, columns)


def is_whole(file: Path) -> bool:
    """Whether all of an image's pixels can be read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            image.load()
            return True
    except Exception:  # decoders fed with broken data raise nearly anything
        return False


def numbered(file: Path, count: int) -> list[Path]:
    """The file itself, or cat-000.png, cat-001.png … for several."""
    if count == 1:
        return [file]
    return [file.with_name(f"{file.stem}-{k:03d}{file.suffix}") for k in range(count)]


def save_animation(images: Sequence[Image], file: Path, seconds: float = 0.1) -> Path:
    """Write images as the frames of an endless GIF, all at once.

    Args:    seconds: that each is shown.
    Raises:  UserError: it cannot be written.
    """
    try:
        with atomic_file(file) as new:
            images[0].save(
                new,
                "GIF",
                save_all=True,
                append_images=images[1:],
                duration=round(1000 * seconds),
                loop=0,
            )
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}).") from error
    return file


def check_image_file(file: Path, option: str) -> None:
    """Make the folder of an image to come.

    Args:    option: what it was given as, for the message.
    Raises:  UserError: not a format that images are written in, or it cannot be written there.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(file.suffix.lower())
    try:
        # Of the formats that Pillow reads it writes some only, and not all of them in colour.
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind or "")
    except Exception as error:  # an encoder that is not there raises nearly anything
        raise UserError(
            f"{option} must be an image file such as cat.png; got {file}."
            + f" Images cannot be written in {kind}; take .png, .jpg or .webp." * (kind is not None)
        ) from error
    check_place(file, option)


def check_place(file: Path, option: str) -> None:
    """Make the folder of a file to come. Raises: UserError: it cannot be written there."""
    try:
        if file.is_dir():
            raise UserError(f"{option} must be a file; {file} is a folder.")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{option}: {file} cannot be written ({reason}). Name another.") from error


#: EXIF's tags for a description, for the tags of the exposure, and among these for a comment.
_DESCRIPTION, _EXPOSURE, _COMMENT = 0x010E, 0x8769, 0x9286
#: How a comment in UTF-16 begins.
_UNICODE = b"UNICODE\0"


def save_image(image: Image, file: Path, texts: Mapping[str, str] | None = None) -> Path:
    """Write an image, all at once.

    Args:    texts: what PNG files carry beside the pixels, by keyword: as tEXt where it is Latin-1
             and iTXt (UTF-8) otherwise. JPEG, WebP, AVIF and TIFF files have the one called
             `parameters` as A1111 writes it, in EXIF's UserComment (UTF-16), and `latentdiff`,
             which must be ASCII, in its ImageDescription. Other formats have none.
    Returns: the file; one that ends in .png, with a warning, where the format can't hold so many
             pixels, or so long a text.
    Raises:  UserError: it cannot be written; an older file is as it was.
    """
    try:
        with atomic_file(file) as new:
            image.save(new, **(_beside_pixels(texts, file) if texts else {}))
        return file
    except Exception as error:  # encoders raise nearly anything; what the system says has a number
        number = getattr(error, "errno", None)
        if number is not None or file.suffix.lower() == ".png":
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file} cannot be written ({reason}).") from error
        png = file.with_suffix(".png")
        warn(
            f"{file} cannot hold {image.width} × {image.height} pixels"
            f"{' and how they were made' if texts else ''} ({error}); they are in {png.name}"
        )
        return save_image(image, png, texts)


def encoded_image(image: Image, ending: str, texts: Mapping[str, str]) -> bytes:
    """What the file of an image would hold.

    Args:    ending: .png, .jpg …  texts: see `save_image`.
    """
    content, file = io.BytesIO(), Path("image").with_suffix(ending)
    kind = {".jpg": "JPEG"}.get(ending, ending.removeprefix(".").upper())
    image.save(content, kind, **(_beside_pixels(texts, file) if texts else {}))
    return content.getvalue()


def _beside_pixels(texts: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Options of Pillow's `save` that put texts into a file."""
    from PIL import Image, PngImagePlugin

    whole = {name: whole_text(text) for name, text in texts.items()}
    if Image.registered_extensions().get(file.suffix.lower()) == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for name, text in whole.items():
            chunks.add_text(name, text)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    if "parameters" in whole:
        comment = _UNICODE + whole["parameters"].encode("utf-16-be")
        exif.get_ifd(_EXPOSURE)[_COMMENT] = comment
    if "latentdiff" in whole:
        exif[_DESCRIPTION] = whole["latentdiff"]
    return {"exif": exif}


def read_texts(file: Path | bytes) -> dict[str, str]:
    """The texts beside an image's pixels, by keyword, wherever `save_image` put them.

    Others of EXIF's are there too, by the numbers of their tags. Nothing is decoded unless a PNG
    has none of its texts before the pixels.

    Raises:  UserError: there is no image.
    """
    from PIL import Image

    name = "image" if isinstance(file, bytes) else file
    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with warnings.catch_warnings(), Image.open(opened) as image:
            warnings.simplefilter("ignore")  # of many pixels, which are not decoded, and of EXIF
            exif = image.getexif()
            texts = {f"{tag}": text for tag, text in exif.items() if isinstance(text, str)}
            if _DESCRIPTION in exif:
                texts["latentdiff"] = texts.pop(str(_DESCRIPTION), "")
            if comment := exif.get_ifd(_EXPOSURE).get(_COMMENT):
                texts["parameters"] = _comment(comment)
            texts |= {str(name): text for name, text in image.info.items() if isinstance(text, str)}
            if image.format == "PNG" and "parameters" not in texts:
                with suppress(OSError):  # truncated
                    image.load()
                    texts |= image.text  # type: ignore[attr-defined]
            return texts
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large to open safely ({error}).") from error
    except Exception as error:  # decoders fed with broken data raise nearly anything
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise UserError(f"{name} cannot be read as an image ({reason}).") from error


def _comment(raw: bytes | str) -> str:
    """The text of EXIF's UserComment; its UTF-16 may be of either order, whatever EXIF's is."""
    if isinstance(raw, str):
        return raw
    if not raw.startswith(_UNICODE):
        return raw.removeprefix(b"ASCII\0\0\0").removeprefix(bytes(8)).decode("utf-8", "replace")
    raw = raw.removeprefix(_UNICODE)
    order = "le" if raw[1::2].count(0) > raw[::2].count(0) else "be"
    return raw.decode(f"utf-16-{order}", "replace").removeprefix("\ufeff")
