"""Make what evaluate.py compares the model with: drawings as reference, and asks.

    python recipes/emoji/make_evaluation.py OUTPUT --packages node_modules

Writes OUTPUT/reference (every drawing on white; captions: its name, its artist's words),
OUTPUT/asks.jsonl with real images of what is asked for in OUTPUT/scenes, and
OUTPUT/generation_config.json for the model's folder. What is asked for was held out from training:
drawings by artists that a thing was not seen from, colours, pairs, and other names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from captions import plural
from scenes import GROUNDS, HUES, Chooser, Drawings, Placed, Scene, draw, sides, slots
from vocabulary import ARTISTS, Thing, held_out, is_countable, read_things, unit_hash, with_article

#: Asks of a kind.
ASKS = {"names": 300, "artists": 150, "colours": 150, "pairs": 100, "counts": 90, "seeds": 24}
SEEDS = 8
WHITE = ("white",)
_BOX = (14, 14, 100, 100)
#: What a new user would type.
TYPED = Path(__file__).parent / "typed.txt"

Ask = tuple[dict[str, Any], Scene | None]


def shuffled(kind: str, things: Sequence[Any]) -> list[Any]:
    """In an order that depends on the names alone."""
    return sorted(things, key=lambda one: unit_hash(kind, *map(_name, _parts(one))))


def _parts(one: Any) -> tuple[Any, ...]:
    return one if isinstance(one, tuple) else (one,)


def _name(part: Any) -> str:
    return part.name if isinstance(part, Thing) else str(part)


def alone(thing: Thing, artist: str, colour: str | None = None) -> Scene:
    """A scene of one thing in the middle, on white."""
    return Scene((Placed(thing, artist, colour, False, _BOX),), None, WHITE)


def unseen_artists(things: list[Thing]) -> Iterator[Ask]:
    """Things in a style that they were not seen in."""
    for thing in things:
        for artist in thing.svg.keys() - {*thing.artists}:
            style = ARTISTS[artist]
            x = with_article(thing.name)
            ask = {"prompt": f"{with_article(style)} of {x}", "concept": x, "style": style}
            yield ask, alone(thing, artist)


def unseen_colours(things: list[Thing], drawings: Drawings) -> Iterator[Ask]:
    """Things in a colour that they were not seen in, on white."""
    for thing in filter(lambda one: one.has_colour, things):
        for colour in (c for c in HUES if held_out("colour", thing.name, c)):
            x = f"{colour} {thing.name}"
            prompt = with_article(x) if is_countable(thing.name) else x
            artist = thing.artists[0]
            if drawings.coloured(thing, artist, colour) is not None:
                stated = {"concept": with_article(thing.name), "colour": colour}
                ask = {"prompt": prompt, "ground": GROUNDS["white"], **stated}
                yield ask, alone(thing, artist, colour)


def unseen_pairs(things: list[Thing]) -> Iterator[Ask]:
    """Things beside others that they were not seen beside."""
    for thing, other in ((a, b) for a in things for b in things if a.name < b.name):
        if not held_out("pair", thing.name, other.name):
            continue
        swap = unit_hash("swap", thing.name, other.name) < 0.5
        left, right = (other, thing) if swap else (thing, other)
        names = [with_article(one.name) for one in (left, right)]
        choose = Chooser(0, int(unit_hash(left.name, right.name) * 2**30))
        artist = next((a for a in left.artists if a in right.artists), left.artists[0])
        placed = tuple(
            Placed(one, artist if artist in one.svg else one.artists[0], None, False, box)
            for one, box in zip((left, right), sides(choose, "left of"), strict=True)
        )
        ask = {"prompt": f"{names[0]} left of {names[1]}", "left": names[0], "right": names[1]}
        yield ask, Scene(placed, "left of", WHITE)


def counts(things: list[Thing]) -> Iterator[Ask]:
    """One, two and three of a thing, in turn."""
    for number, thing in enumerate(filter(lambda one: is_countable(one.name), things)):
        count = number % 3 + 1
        words = ("", "two ", "three ")[count - 1]
        prompt = words + plural(thing.name) if count > 1 else with_article(thing.name)
        boxes = slots(Chooser(1, number), count) if count > 1 else [_BOX]
        placed = tuple(Placed(thing, thing.artists[0], None, False, box) for box in boxes)
        yield {"prompt": prompt, "count": count}, Scene(placed, None, WHITE)


def all_asks(things: list[Thing], drawings: Drawings) -> Iterator[tuple[str, Ask]]:
    """Every ask with its group."""
    whole = [one for one in shuffled("counts", things) if in_one_piece(one, drawings)]
    groups = {
        "names": [
            ({"prompt": x, "concept": x}, None)
            for x in (with_article(one.name) for one in shuffled("names", things))
        ],
        "artists": shuffled_asks(unseen_artists(things)),
        "colours": shuffled_asks(unseen_colours(things, drawings)),
        "pairs": shuffled_asks(unseen_pairs(things)),
        "counts": list(counts(whole)),
        "seeds": [
            ({"prompt": x, "concept": x, "seeds": SEEDS}, None)
            for x in (with_article(one.name) for one in shuffled("seeds", things))
        ],
    }
    for group, asks in groups.items():
        yield from ((group, ask) for ask in asks[: ASKS[group]])
    for thing in things:
        for name in thing.held_out_synonyms:
            ask = {"prompt": with_article(name), "concept": with_article(thing.name)}
            yield "other names", (ask, None)
    for prompt in TYPED.read_text(encoding="utf-8").splitlines():
        yield "typed", ({"prompt": prompt}, None)


def shuffled_asks(asks: Iterator[Ask]) -> list[Ask]:
    """In an order that depends on the prompts alone."""
    return sorted(asks, key=lambda one: unit_hash("ask", one[0]["prompt"]))


def in_one_piece(thing: Thing, drawings: Drawings) -> bool:
    """Whether all artists draw the thing as one object."""
    from latentdiff.evaluation.objects import objects

    drawn = (draw(alone(thing, a), drawings, Chooser(0, 0)) for a in thing.svg)
    return all(len(objects(one)) == 1 for one in drawn)


def write_reference(folder: Path, things: list[Thing], drawings: Drawings) -> None:
    """Write every drawing on white with its name and its artist's words."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for thing in things:
        for artist in thing.svg:
            file = f"{thing.emoji}-{artist}.png"
            draw(alone(thing, artist), drawings, Chooser(0, 0)).save(folder / file)
            row = {"file_name": file, "text": [with_article(thing.name), ARTISTS[artist]]}
            lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def write_asks(output: Path, things: list[Thing], drawings: Drawings) -> None:
    """Write asks.jsonl and the images of what is asked for."""
    (output / "scenes").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (group, (ask, scene)) in enumerate(all_asks(things, drawings)):
        row = {"group": group, **ask}
        if scene is not None:
            row["image"] = f"scenes/{number:04d}.png"
            draw(scene, drawings, Chooser(0, number)).save(output / row["image"])
        lines.append(json.dumps(row) + "\n")
    (output / "asks.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", required=True, help="the node_modules folder of the packages")
    parser.add_argument("--things", type=int, default=400, help="size of the vocabulary")
    given = parser.parse_args()
    things, drawings = read_things(Path(given.packages), given.things), Drawings()
    write_reference(given.output / "reference", things, drawings)
    write_asks(given.output, things, drawings)
    known = [name for thing in things for name in (thing.name, *thing.synonyms)]
    file = given.output / "generation_config.json"
    file.write_text(json.dumps({"known_things": known}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
