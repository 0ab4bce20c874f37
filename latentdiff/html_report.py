"""HTML reports that need no other file: Jinja2 templates of assets/report, images inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import printable
from latentdiff.files import atomic_file

if TYPE_CHECKING:
    from PIL.Image import Image


def write_html(file: Path, template: str, **values: Any) -> None:
    """Fill a template of assets/report and write it piece by piece: iterables may be generators.

    The file appears when it is complete. Every string is escaped for HTML and made `printable`.
    Raises: OSError: not writable.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("latentdiff", "assets/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters["data_url"] = data_url
    with atomic_file(file) as new:
        environment.get_template(template).stream(**values).dump(str(new), encoding="utf-8")


def data_url(image: Image, format: str = "PNG", **options: Any) -> str:
    """The image as the value of an <img>'s src. Args: options: as of `Image.save`."""
    data = io.BytesIO()
    image.save(data, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
