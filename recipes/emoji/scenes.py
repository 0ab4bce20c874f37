"""Scenes: what stands where, in which colour, on which ground; and the image of it.

Every choice is a hash of (seed, index of the image, name of the choice), so that an image
depends on nothing but its number.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import resvg_py
from PIL import Image
from vocabulary import ARTISTS, Thing, held_out, is_countable, unit_hash

SIDE = 128
#: Drawings are made larger than they are shown.
_DRAWN_SIDE = 160
#: Hue of a colour word in degrees, and the least saturation and value of what it names.
HUES = {
    "red": (0, 0.7, 0.75),
    "orange": (28, 0.8, 0.95),
    "yellow": (52, 0.7, 0.95),
    "green": (125, 0.5, 0.6),
    "blue": (215, 0.6, 0.7),
    "purple": (278, 0.5, 0.65),
    "pink": (330, 0.4, 0.95),
}
GROUNDS = {
    "white": (255, 255, 255), "grey": (165, 165, 165), "black": (20, 20, 20),
    "red": (222, 52, 50), "orange": (245, 150, 45), "yellow": (250, 218, 75),
    "green": (85, 175, 85), "blue": (65, 125, 230), "purple": (145, 85, 200),
    "pink": (250, 165, 200), "brown": (140, 95, 60), "light blue": (175, 215, 250),
    "light green": (190, 235, 185),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below", "and")
T = TypeVar("T")


@dataclass(frozen=True)
class Placed:
    """A thing as it is drawn: by whom, in which colour (None: its own), where."""

    thing: Thing
    artist: str
    colour: str | None
    mirrored: bool
    box: tuple[int, int, int, int]
    """Left, top, width, height in pixels; the drawing is centred in it and fills one direction."""


@dataclass(frozen=True)
class Scene:
    """One image's content."""

    placed: tuple[Placed, ...]
    relation: str | None
    """Of two different things; None for one thing or several of the same."""
    ground: tuple[str, ...]
    """One colour, or two: left and right halves."""


class Chooser:
    """Named choices of one image."""

    def __init__(self, seed: int, index: int) -> None:
        self._key = (seed, index)

    def share(self, name: str) -> float:
        """A number in [0, 1)."""
        return unit_hash(*self._key, name)

    def pick(self, name: str, options: Sequence[T]) -> T:
        """One of several, equally likely."""
        return options[int(self.share(name) * len(options))]

    def between(self, name: str, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.share(name)


class Drawings:
    """Cut-outs of the things, each drawn once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Image.Image] = {}
        self.coloured = lru_cache(maxsize=64)(self._coloured)

    def cut_out(self, thing: Thing, artist: str) -> Image.Image:
        """The drawing without the transparent margin around it, RGBA."""
        key = thing.emoji, artist
        if key not in self._kept:
            png = resvg_py.svg_to_bytes(
                svg_string=thing.svg[artist], width=_DRAWN_SIDE, height=_DRAWN_SIDE
            )
            image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
            self._kept[key] = image.crop(image.getchannel("A").getbbox())
        return self._kept[key]

    def _coloured(self, thing: Thing, artist: str, colour: str) -> Image.Image | None:
        """The drawing with its hues turned so that most of it has the colour.

        Returns: None where less than half of the drawing has a hue to turn.
        """
        image = self.cut_out(thing, artist)
        alpha = image.getchannel("A")
        hue, saturation, value = HUES[colour]
        if artist == "fluent-emoji-high-contrast":  # black only
            rgb = Image.new("HSV", (1, 1), (round(hue / 360 * 255), 200, round(value * 240)))
            plain = Image.new("RGB", image.size, rgb.convert("RGB").getpixel((0, 0)))
            plain.putalpha(alpha)
            return plain
        h, s, v = (
            np.asarray(image.convert("RGB").convert("HSV")).astype(np.float32).transpose(2, 0, 1)
        )
        seen = np.asarray(alpha) > 128
        hued = seen & (s > 60) & (v > 50)
        if hued.sum() < 0.5 * seen.sum():
            return None
        most = np.bincount(h[hued].astype(int) // 8, s[hued], minlength=32).argmax() * 8 + 4
        near = hued & (np.abs((h - most + 128) % 256 - 128) < 16)
        h = (h + hue / 360 * 256 - np.median(h[near])) % 256
        # Brown turned yellow is olive: what is too pale or dark for the word is raised.
        s = np.where(s > 60, s * max(1.0, saturation * 255 / np.median(s[near])), s)
        v = v * max(1.0, value * 255 / np.median(v[near]))
        turned = np.stack([h, s.clip(0, 255), v.clip(0, 255)], axis=2).astype(np.uint8)
        result = Image.fromarray(turned, "HSV").convert("RGB")
        result.putalpha(alpha)
        return result


def compose(things: Sequence[Thing], drawings: Drawings, choose: Chooser) -> Scene:
    """Decide an image's content."""
    kind = choose.share("kind")
    artist = choose.pick("artist", tuple(ARTISTS))
    first = choose.pick("first", things)
    if kind < 0.62:
        relation, chosen, boxes = (
            None,
            [first],
            [box_in(choose, "box", (0, 0, SIDE, SIDE), 74, 120)],
        )
    elif kind < 0.76 and is_countable(first.name):
        count = choose.pick("count", (2, 2, 3))
        relation, chosen, boxes = None, [first] * count, slots(choose, count)
    else:
        relation = choose.pick("relation", RELATIONS)
        second = _partner(things, first, choose)
        chosen, boxes = [first, second], sides(choose, relation)
    artists = [_artist(thing, artist, choose) for thing in chosen]
    colours = [None if kind < 0.4 else _colour(first, artists[0], drawings, choose)]
    if relation is None:
        colours *= len(chosen)
    else:
        colours.append(_colour(chosen[1], artists[1], drawings, choose, "second "))
    mirrored = choose.share("mirror") < 0.5
    placed = tuple(map(Placed, chosen, artists, colours, [mirrored] * len(chosen), boxes))
    return Scene(placed, relation, _ground(placed, drawings, choose))


def _partner(things: Sequence[Thing], first: Thing, choose: Chooser) -> Thing:
    """Another thing that is seen beside the first in training."""
    for attempt in range(len(things)):
        second = choose.pick(f"partner {attempt}", things)
        pair = sorted((first.name, second.name))
        if second != first and not held_out("pair", *pair):
            return second
    raise ValueError(f"every pair with {first.name} is held out")


def _artist(thing: Thing, wanted: str, choose: Chooser) -> str:
    """The image's artist, or another where that one's drawing is not there."""
    return wanted if wanted in thing.artists else choose.pick("other artist", thing.artists)


def _colour(
    thing: Thing, artist: str, drawings: Drawings, choose: Chooser, which: str = ""
) -> str | None:
    """A colour word that the thing is seen in, or None."""
    if choose.share(f"{which}is coloured") < 0.6 or not thing.has_colour:
        return None
    colour = choose.pick(f"{which}colour", tuple(HUES))
    if held_out("colour", thing.name, colour):
        return None
    return colour if drawings.coloured(thing, artist, colour) is not None else None


def box_in(
    choose: Chooser, name: str, area: tuple[int, int, int, int], low: int, high: int
) -> tuple[int, int, int, int]:
    """A square of `low` … `high` pixels somewhere in an area (left, top, width, height)."""
    left, top, width, height = area
    side = int(choose.between(f"{name} side", low, high))
    x, y = (choose.between(f"{name} {axis}", 0, 1) for axis in "xy")
    return left + int(x * (width - side + 1)), top + int(y * (height - side + 1)), side, side


def slots(choose: Chooser, count: int) -> list[tuple[int, int, int, int]]:
    """Boxes of one size that do not touch: a row, a column or (of three) a triangle."""
    layout = choose.pick("layout", ("row", "column", "triangle"))
    if count == 2 or layout != "triangle":
        step = SIDE // count
        side = int(choose.between("slot side", 0.75, 0.95) * step)
        across = int(choose.between("slot across", 0.2, 0.8) * (SIDE - side))
        along = [i * step + (step - side) // 2 for i in range(count)]
        places = [(a, across) if layout != "column" else (across, a) for a in along]
    else:
        side = int(choose.between("slot side", 46, 58))
        places = [((SIDE - side) // 2, 3), (4, SIDE - side - 3), (SIDE - side - 4, SIDE - side - 3)]
    return [(x, y, side, side) for x, y in places]


def sides(choose: Chooser, relation: str) -> list[tuple[int, int, int, int]]:
    """Boxes of the first and the second thing in two halves."""
    half = SIDE // 2
    halves = [(1, 0, half - 2, SIDE), (half + 1, 0, half - 2, SIDE)]
    if relation in ("above", "below"):
        halves = [(0, 1, SIDE, half - 2), (0, half + 1, SIDE, half - 2)]
    if relation in ("right of", "below"):
        halves.reverse()
    return [box_in(choose, f"box {i}", area, 44, half - 2) for i, area in enumerate(halves)]


def _ground(placed: Sequence[Placed], drawings: Drawings, choose: Chooser) -> tuple[str, ...]:
    """Colours of the ground that every drawing stands out from."""
    kind = choose.share("ground kind")
    first = ["white"] if kind < 0.5 else []
    options = first + [choose.pick(f"ground {i}", tuple(GROUNDS)) for i in range(20)]
    outlines = [_outline(_drawing(one, drawings)) for one in placed]
    seen = [
        name
        for name in dict.fromkeys(options)
        if all(_stands_out(outline, GROUNDS[name]) for outline in outlines)
    ]
    if kind > 0.87 and len(seen) > 1:
        return seen[0], seen[1]
    return ((seen or options)[0],)


def _outline(image: Image.Image) -> np.ndarray:
    """Colours (n, 3) along the edge of a cut-out."""
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)).astype(np.float32)
    inside = pixels[..., 3] > 128
    padded = np.pad(inside, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return pixels[..., :3][inside & ~inner]


def _stands_out(outline: np.ndarray, ground: tuple[int, int, int]) -> bool:
    """Whether most of an outline differs from the ground."""
    return bool((np.linalg.norm(outline - np.float32(ground), axis=1) > 90).mean() > 0.6)


def _drawing(one: Placed, drawings: Drawings) -> Image.Image:
    if one.colour is not None:
        coloured = drawings.coloured(one.thing, one.artist, one.colour)
        if coloured is not None:
            return coloured
    return drawings.cut_out(one.thing, one.artist)


def draw(scene: Scene, drawings: Drawings, choose: Chooser) -> Image.Image:
    """The image of a scene, RGB, SIDE × SIDE pixels."""
    canvas = Image.new("RGB", (SIDE, SIDE), _shade(scene.ground[0], choose))
    if len(scene.ground) == 2:
        canvas.paste(_shade(scene.ground[1], choose), (SIDE // 2, 0, SIDE, SIDE))
    for canvas in scene.placed:
        left, top, width, height = canvas.box
        image = _drawing(canvas, drawings)
        scale = min(width / image.width, height / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        if canvas.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        canvas.paste(image, (left + (width - size[0]) // 2, top + (height - size[1]) // 2), image)
    return canvas


def _shade(ground: str, choose: Chooser) -> tuple[int, int, int]:
    """A ground's colour, a little different in every image; white is white."""
    if ground == "white":
        return GROUNDS[ground]
    red, green, blue = (
        min(255, max(0, round(value + choose.between(f"{ground} {i}", -14, 14))))
        for i, value in enumerate(GROUNDS[ground])
    )
    return red, green, blue
