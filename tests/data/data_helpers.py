"""Small data sets for the tests of latentdiff.data."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def sample_image(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    sample_image(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(
    folder: Path, count: int = 6, rows: list[Mapping[str, object]] | None = None
) -> Path:
    """Make images/0.png …, with metadata.jsonl (caption "image i" unless rows are given)."""
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(png(i))
    if rows is None:
        rows = [{"file_name": f"images/{i}.png", "text": f"image {i}"} for i in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
