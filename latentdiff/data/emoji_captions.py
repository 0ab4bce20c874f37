"""What is said about a rendering of the embedded set: fixed phrases, free phrases, other names.

The other names are keywords of Unicode CLDR 41 (English annotations) that belong to one or two
concepts only, so "engine" is a locomotive but "animal" is nothing in particular.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

KEYWORDS = Path(__file__).parent.parent / "assets" / "emoji_keywords.json"
#: Ways in which people ask for a thing when they name no style.
FREE = (
    "a photo of {a}",
    "a photo of my {name}",
    "my {name}",
    "the {name}",
    "a cute {name}",
    "an image of {a}",
    "a drawing of {a}",
    "draw {a}",
    "please draw {a}",
    "{a} icon",
)
#: Other words for the styles.
STYLED = {
    "painting": ("an oil painting of {a}", "a painted {name}", "paint {a}", "{name} painting"),
    "pencil sketch": (
        "a pencil drawing of {a}",
        "a sketch of my {name}",
        "a black and white sketch of {a}",
        "{name} drawn with a pencil",
    ),
    "pixel art": (
        "{a} in pixel art style",
        "a pixelated {name}",
        "8-bit {name}",
        "pixel art {name}",
    ),
}
GROUNDS = (" on {ground}", " in front of {a_ground} background", ", {ground} background")


def unit_hash(*words: object) -> float:
    """Map words to a number in [0, 1) that never changes between runs or machines."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def with_article(words: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


@lru_cache(maxsize=1)
def keywords() -> dict[str, list[str]]:
    """Return the other names by concept; many concepts have none."""
    found: dict[str, list[str]] = json.loads(KEYWORDS.read_text(encoding="utf-8"))
    return found


def fixed_captions(name: str, style: str, background: str) -> tuple[str, ...]:
    """Say name, style and ground in the phrases that the documentation uses."""
    a_name = with_article(name)
    if style == "plain":
        heads = [name, a_name, f"a picture of {a_name}", f"an emoji of {a_name}"]
    else:
        a_style = style if style == "pixel art" else with_article(style)
        short = style.removeprefix("pencil ")
        heads = [
            f"{a_style} of {a_name}",
            f"{a_style} of {name}",
            f"{a_name} {short}",
            f"{name}, {style}",
        ]
    if background == "white":
        return tuple(heads)
    ground = with_article(f"{background} background")
    tails = [f" on {ground}", f" with {ground}"]
    return tuple(head + tail for head in heads for tail in tails)


def free_captions(concept: str, name: str, style: str, background: str) -> tuple[str, ...]:
    """Say the same in one free phrase, and once by another name where there is one.

    Which phrase and which other name is a fixed choice for each rendering, so the renderings of a
    concept share them out.
    """
    key = (concept, name, style, background)
    phrase = _pick(FREE if style == "plain" else STYLED[style], "phrase", *key)
    tail = ""
    if background != "white":
        tail = _pick(GROUNDS, "ground", *key)
        tail = tail.format(ground=background, a_ground=with_article(background))
    captions = [phrase.format(name=name, a=with_article(name)) + tail]
    others = keywords().get(concept, []) if name == concept else []
    if others:
        other = _pick(tuple(others), "other", *key)
        captions.append(_pick(fixed_captions(other, style, background), "fixed", *key))
    return tuple(captions)


def _pick(choices: tuple[str, ...], *key: str) -> str:
    return choices[int(unit_hash(*key) * len(choices))]
