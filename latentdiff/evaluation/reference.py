"""What a model is compared with: captioned images of any data set.

An image's first caption is the prompt that asks for it and the name of the concept that it shows;
several images may show one concept. A second caption, if there is one, names the image's style.
Which concepts are taken is decided by a hash of their names, so two models are asked for the same
ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.images import UnreadableImage, fit
from latentdiff.data.source import EXAMPLE, DataConfig, Source, open_source
from latentdiff.errors import UserError, printable


@dataclass(frozen=True)
class Reference:
    """The images of some concepts."""

    prompts: list[str]
    """One for each concept, C in all."""
    images: list[Image.Image]
    """M ≥ C squares, those of a concept together."""
    labels: Tensor
    """Which concept each image shows, (M,) int64, ascending."""
    styles: list[str] = field(default_factory=list)
    """The second caption of each image; empty if it has one only."""

    def one_each(self) -> list[Image.Image]:
        """The first image of each concept."""
        first = torch.searchsorted(self.labels, torch.arange(len(self.prompts)))
        return [self.images[row] for row in first.tolist()]


def open_reference(data: DataConfig, count: int, size: int) -> Reference:
    """Read the images of `count` concepts, or of all if there are fewer.

    Args:    size: their side in pixels; the longer side is cut in the middle.
    Raises:  UserError: the data set cannot be opened, or shows fewer than two concepts.
    """
    source = open_source(data)
    rows = dict[str, list[int]]()
    for index in range(len(source)):
        rows.setdefault(source.captions(index)[0], []).append(index)
    prompts, images, labels = list[str](), list[Image.Image](), list[int]()
    styles = list[str]()
    for name in sorted(rows, key=_hash)[:count]:
        found = {r: image for r in rows[name] if (image := _read(source, r, size)) is not None}
        labels += [len(prompts)] * len(found)
        images += found.values()
        styles += ["".join(source.captions(row)[1:2]) for row in found]
        prompts += [name] * bool(found)
    if len(prompts) < 2:
        raise UserError(
            f"a reference needs images of two concepts or more; {data.path or EXAMPLE} has "
            f"{len(prompts)}. A concept is called by its images' first caption."
        )
    return Reference(prompts, images, torch.tensor(labels), styles)


def _hash(name: str) -> bytes:
    return hashlib.blake2b(f"evaluation\x1f{name}".encode(), digest_size=8).digest()


def _read(source: Source, index: int, size: int) -> Image.Image | None:
    try:
        return fit(source[index].image, size)
    except UnreadableImage as problem:
        print(f"left out: {printable(str(problem))}", flush=True)
        return None
