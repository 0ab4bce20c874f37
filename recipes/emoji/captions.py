"""Captions of a scene, from a small grammar.

    caption = [artist's words] things [on … background]
    things  = "a blue apple" | "two cats" | "a dog left of a tree"

Colours, and backgrounds other than white, are always named. The artist is named in one of an
image's three captions and left open in the others; one caption uses another name of the thing, if
it has any.
"""

from __future__ import annotations

from scenes import Chooser, Placed, Scene
from vocabulary import ARTISTS, Thing, is_countable, with_article

_NUMBERS = {2: "two", 3: "three"}
_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "leaf": "leaves", "wolf": "wolves", "knife": "knives",
    "scarf": "scarves", "fish": "fish", "deer": "deer", "sheep": "sheep", "shrimp": "shrimp",
    "squid": "squid", "moose": "moose", "calf": "calves", "loaf": "loaves",
}  # fmt: skip
_FRAMES = (
    "{x}",
    "{x}",
    "a picture of {x}",
    "an emoji of {x}",
    "an icon of {x}",
    "a drawing of {x}",
)
_STYLED = ("{artist} of {x}", "{artist} of {x}", "{x}, {style}")
_PAIRS = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}"),
    "above": ("{a} above {b}", "{a} over {b}"),
    "below": ("{a} below {b}", "{a} under {b}"),
    "and": ("{a} and {b}", "{a} next to {b}", "{a} with {b}"),
}


def plural(name: str) -> str:
    """More than one of a thing: "cups of tea", "women", "boxes"."""
    head, joint, rest = name.partition(" of ")
    if not joint:
        head, joint, rest = name.partition(" with ")
    first, last = head.rpartition(" ")[::2]
    if last in _PLURALS:
        last = _PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last.endswith(("tomato", "potato", "mosquito", "mango", "hero")):
        last += "es"
    else:
        last += "s"
    return f"{first} {last}".strip() + joint + rest


def captions(scene: Scene, choose: Chooser) -> list[str]:
    """Three captions of a scene: plain, by another name, with the artist's words."""
    names = [one.thing.name for one in scene.placed]
    others = [_other_name(one.thing, choose) for one in scene.placed]
    framed = choose.pick("frame", _FRAMES).format(x=_things(scene, others, choose, "other"))
    said = [_things(scene, names, choose, "plain"), framed]
    artists = {one.artist for one in scene.placed}
    if len(artists) == 1:
        style = ARTISTS[artists.pop()]
        x = _things(scene, names, choose, "styled")
        frame = choose.pick("style", _STYLED)
        said.append(frame.format(artist=with_article(style), style=style, x=x))
    return [text + _ground(scene, choose, number) for number, text in enumerate(said)]


def _other_name(thing: Thing, choose: Chooser) -> str:
    options = thing.synonyms
    return choose.pick("other name", options) if options else thing.name


def _things(scene: Scene, names: list[str], choose: Chooser, key: str) -> str:
    first = scene.placed[0]
    if scene.relation is not None:
        a, b = (_singular(one, name) for one, name in zip(scene.placed, names, strict=True))
        return choose.pick(f"{key} relation", _PAIRS[scene.relation]).format(a=a, b=b)
    if len(names) == 1:
        return _singular(first, names[0])
    name = names[0] if is_countable(names[0]) else first.thing.name
    return f"{_NUMBERS[len(names)]} {_coloured(first, plural(name))}"


def _coloured(one: Placed, name: str) -> str:
    return f"{one.colour} {name}" if one.colour else name


def _singular(one: Placed, name: str) -> str:
    said = _coloured(one, name)
    return with_article(said) if is_countable(name) else said


def _ground(scene: Scene, choose: Chooser, number: int) -> str:
    if scene.ground == ("white",) and choose.share(f"{number} white") < 0.8:
        return ""
    return f" on a{'n' * (scene.ground[0] == 'orange')} {' and '.join(scene.ground)} background"
