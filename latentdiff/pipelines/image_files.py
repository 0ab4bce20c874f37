"""Writing pictures to files: what cannot work is said before the work, and no picture is lost."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image


def check_picture_file(file: Path, option: str) -> None:
    """Make the folder of a picture to come.

    Args:    option: what it was given as, for the message.
    Raises:  UserError: not a format that pictures are written in, or it cannot be written there.
    """
    from PIL import Image

    kind = Image.registered_extensions().get(file.suffix.lower())
    try:
        # Of the formats that Pillow reads it writes some only, and not all of them in colour.
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind or "")
    except Exception as error:  # an encoder that is not there raises nearly anything
        raise UserError(
            f"{option} must be a picture file such as cat.png; got {file}."
            + f" Pictures cannot be written in {kind}; take .png, .jpg or .webp."
            * (kind is not None)
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


def save_picture(image: Image, file: Path) -> Path:
    """Write a picture, all at once.

    Returns: the file; one that ends in .png, with a warning, where the format can't hold so many
             pixels.
    Raises:  UserError: it cannot be written; an older file is as it was.
    """
    try:
        with atomic_file(file) as new:
            image.save(new)
        return file
    except Exception as error:  # encoders raise nearly anything; what the system says has a number
        number = getattr(error, "errno", None)
        if number is not None or file.suffix.lower() == ".png":
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file} cannot be written ({reason}).") from error
        png = file.with_suffix(".png")
        warnings.warn(
            f"{file} cannot hold {image.width} × {image.height} pixels ({error}); they are in "
            f"{png.name}",
            stacklevel=2,
        )
        return save_picture(image, png)
