"""Make the training images: composed scenes of emoji with captions, as tar shards.

    python recipes/emoji/make_data.py OUTPUT --packages node_modules [--count 96000]

Writes OUTPUT/train-00000.tar … (WebDataset: 00000000.png and 00000000.json with the captions under
"text"), metadata.jsonl (the same facts for all images) and vocabulary.json (the things, who drew
them, and what is held out). Image i is a function of (seed, i) alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from captions import captions
from PIL import Image
from scenes import HUES, Chooser, Drawings, Scene, compose, draw
from vocabulary import Thing, held_out, read_things

SHARD = 8000


@lru_cache(maxsize=1)
def _things(packages: str, size: int) -> list[Thing]:
    return read_things(Path(packages), size)


@lru_cache(maxsize=1)
def _drawings() -> Drawings:
    return Drawings()


def scene_image(things: list[Thing], seed: int, index: int) -> tuple[Image.Image, dict[str, Any]]:
    """Image `index` of the set, and its row of metadata."""
    choose, drawings = Chooser(seed, index), _drawings()
    scene = compose(things, drawings, choose)
    return draw(scene, drawings, choose), {
        "text": captions(scene, choose),
        **_facts(scene),
    }


def _facts(scene: Scene) -> dict[str, Any]:
    things = [
        {"name": one.thing.name, "artist": one.artist, "colour": one.colour, "box": one.box}
        for one in scene.placed
    ]
    return {"things": things, "relation": scene.relation, "ground": scene.ground}


def write_shard(
    output: str, packages: str, size: int, seed: int, start: int, stop: int
) -> list[str]:
    """Write images `start` … `stop` − 1 as one shard; return their lines of metadata.jsonl."""
    things, lines = _things(packages, size), []
    path = Path(output) / f"train-{start // SHARD:05d}.tar"
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(start, stop):
            image, row = scene_image(things, seed, index)
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            _add(tar, f"{index:08d}.png", buffer.getvalue())
            _add(tar, f"{index:08d}.json", json.dumps(row).encode())
            lines.append(json.dumps({"file_name": f"{path.name}/{index:08d}.png", **row}))
    os.replace(partial, path)
    return lines


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes every time
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_vocabulary(output: Path, things: list[Thing]) -> None:
    """Write names, artists, and what is held out from training."""
    names = [thing.name for thing in things]
    pairs = ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    facts = {
        "things": [
            {
                "name": thing.name,
                "emoji": thing.emoji,
                "artists": list(thing.artists),
                "synonyms": list(thing.synonyms),
                "held_out_artists": [a for a in thing.svg if a not in thing.artists],
                "held_out_synonyms": list(thing.held_out_synonyms),
                "held_out_colours": [c for c in HUES if held_out("colour", thing.name, c)],
            }
            for thing in things
        ],
        "held_out_pairs": [pair for pair in pairs if held_out("pair", *sorted(pair))],
    }
    (output / "vocabulary.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path)
    parser.add_argument("--packages", required=True, help="the node_modules folder of the packages")
    parser.add_argument("--count", type=int, default=96_000, help="images")
    parser.add_argument("--things", type=int, default=400, help="size of the vocabulary")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    write_vocabulary(given.output, _things(given.packages, given.things))
    starts = range(0, given.count, SHARD)
    shared = (str(given.output), given.packages, given.things, given.seed)
    with (
        ProcessPoolExecutor(given.workers) as pool,
        open(given.output / "metadata.jsonl", "w", encoding="utf-8") as metadata,
    ):
        shards = [
            pool.submit(write_shard, *shared, start, min(start + SHARD, given.count))
            for start in starts
        ]
        for number, shard in enumerate(shards, 1):
            metadata.writelines(line + "\n" for line in shard.result())
            print(f"{number} of {len(shards)} shards", flush=True)


if __name__ == "__main__":
    main()
