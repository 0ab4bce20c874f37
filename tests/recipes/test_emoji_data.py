"""The emoji data set: captions' grammar, what is held out, images that depend on their number.

The drawings and word lists are npm packages; here two made-up things stand in for them.
"""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resvg_py", reason="recipes/emoji/requirements.txt is not installed")
pytest.importorskip("wordfreq", reason="recipes/emoji/requirements.txt is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "emoji"))

import make_data
import make_evaluation
import make_texts
from captions import captions, plural
from scenes import GROUNDS, HUES, Chooser, Drawings, Placed, Scene, compose, draw
from vocabulary import ARTISTS, Thing, held_out, with_article

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8">{}</svg>'
BODY = SVG.format('<rect x="2" y="1" width="4" height="6" fill="#c04020"/>')
DISC = SVG.format('<circle cx="4" cy="4" r="3" fill="#3060c0"/>')


def thing(name: str, svg: str, synonyms: tuple[str, ...] = ()) -> Thing:
    return Thing(name, name, "Objects", dict.fromkeys(ARTISTS, svg), synonyms, ("secret",))


THINGS = [thing("brick", BODY, ("block",)), thing("ball", DISC)]
THINGS += [thing(f"disc {i}", DISC) for i in range(30)]


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(make_data, "_things", lambda packages, size: THINGS)
    monkeypatch.setattr(make_data, "SHARD", 4)


def test_an_image_depends_on_seed_and_number_only(drawn, tmp_path):
    whole = make_data.write_shard(str(tmp_path), "", 2, 5, 0, 4)
    first = (tmp_path / "train-00000.tar").read_bytes()
    alone, row = make_data.scene_image(THINGS, 5, 3)
    again = make_data.write_shard(str(tmp_path), "", 2, 5, 0, 4)
    assert whole == again and (tmp_path / "train-00000.tar").read_bytes() == first
    assert json.loads(whole[3]) == json.loads(
        json.dumps({"file_name": "train-00000.tar/00000003.png", **row})
    )
    with tarfile.open(tmp_path / "train-00000.tar") as tar:
        names = [f"{i:08d}.{ending}" for i in range(4) for ending in ("png", "json")]
        assert tar.getnames() == names
    other, _ = make_data.scene_image(THINGS, 6, 3)
    assert np.any(np.asarray(alone) != np.asarray(other))


@pytest.fixture(scope="module")
def scenes():
    drawings = Drawings()
    return [compose(THINGS, drawings, Chooser(0, i)) for i in range(250)]


def test_what_is_held_out_is_in_no_image(scenes):
    placed = [one for scene in scenes for one in scene.placed]
    assert all(one.artist in one.thing.artists for one in placed)
    colours = {(one.thing.name, one.colour) for one in placed if one.colour}
    assert colours and not any(held_out("colour", *pair) for pair in colours)
    pairs = [sorted(p.thing.name for p in s.placed) for s in scenes if s.relation]
    assert pairs and not any(held_out("pair", *pair) for pair in pairs)
    said = [c for i, s in enumerate(scenes) for c in captions(s, Chooser(0, i))]
    assert any("block" in c for c in said) and not any("secret" in c for c in said)


@pytest.mark.parametrize(
    ("relation", "axis", "sign"), (("left of", 0, 1), ("right of", 0, -1), ("above", 1, 1))
)
def test_things_stand_as_the_caption_says(scenes, relation, axis, sign):
    found = [scene for scene in scenes if scene.relation == relation]
    assert found
    for scene in found:
        a, b = (one.box for one in scene.placed)
        near, far = (a, b) if sign > 0 else (b, a)
        assert near[axis] + near[axis + 2] <= far[axis]


@pytest.mark.parametrize("colour", HUES)
def test_a_coloured_thing_has_the_hue_of_its_word(colour):
    image = Drawings().coloured(THINGS[0], "noto", colour)
    hue = np.asarray(image.convert("RGB").convert("HSV"))[10, 10, 0] / 256 * 360
    assert abs((hue - HUES[colour][0] + 180) % 360 - 180) < 4


def test_a_scene_is_drawn_where_it_says():
    one = Placed(THINGS[0], "noto", None, False, (20, 30, 60, 60))
    pixels = np.asarray(draw(Scene((one,), None, ("white",)), Drawings(), Chooser(0, 0)))
    rows, columns = np.nonzero((pixels != 255).any(2))
    # 4 × 6 units fill the height and stand in the middle of the width.
    assert (rows.min(), rows.max()) == (30, 89)
    assert (columns.min(), columns.max()) == pytest.approx((30, 69), abs=1)
    assert tuple(pixels[60, 50]) == (0xC0, 0x40, 0x20)
    assert tuple(pixels[0, 0]) == GROUNDS["white"]


@pytest.mark.parametrize(
    ("name", "one", "many"),
    (
        ("apple", "an apple", "apples"),
        ("UFO", "a UFO", "UFOs"),
        ("unicorn", "a unicorn", "unicorns"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("bus", "a bus", "buses"),
        ("princess", "a princess", "princesses"),
        ("cup of tea", "a cup of tea", "cups of tea"),
        ("face with sunglasses", "a face with sunglasses", "faces with sunglasses"),
        ("police officer", "a police officer", "police officers"),
        ("woman", "a woman", "women"),
        ("cherry", "a cherry", "cherries"),
        ("key", "a key", "keys"),
        ("potato", "a potato", "potatoes"),
    ),
)
def test_names_in_one_and_many(name, one, many):
    assert with_article(name) == one
    assert plural(name) == many


@pytest.mark.parametrize("name", ("jeans", "bread", "shopping bags", "thumbs up"))
def test_names_without_an_article(name):
    assert with_article(name) == name


def test_texts_speak_of_every_noun_and_depend_on_the_words_alone():
    nouns = ["cello", "yacht", "bread"]
    texts = make_texts.texts(nouns, ["rusty"])
    assert texts == make_texts.texts(nouns, ["rusty"]) and len({*texts}) == len(texts)
    assert {"a cello", "a yacht", "bread"} <= {*texts}
    adjectives = ("rusty", *HUES)
    assert any(f"{word} {noun}" in t for t in texts for word in adjectives for noun in nouns)


def test_asks_are_of_what_was_held_out(tmp_path):
    make_evaluation.write_reference(tmp_path / "reference", THINGS, Drawings())
    make_evaluation.write_asks(tmp_path, THINGS, Drawings())
    rows = [json.loads(line) for line in (tmp_path / "asks.jsonl").read_text().splitlines()]
    names = {with_article(one.name): one for one in THINGS}
    found = {
        group: [r for r in rows if r["group"] == group] for group in {r["group"] for r in rows}
    }
    for row in found["artists"]:
        artist = next(a for a, words in ARTISTS.items() if words == row["style"])
        assert artist not in names[row["concept"]].artists
    for row in found["colours"]:
        assert held_out("colour", names[row["concept"]].name, row["colour"])
    for row in found["pairs"]:
        assert held_out("pair", *sorted(names[row[side]].name for side in ("left", "right")))
    assert {row["prompt"] for row in found["other names"]} == {"a secret"}
    assert {row["count"] for row in found["counts"]} == {1, 2, 3}
    assert all((tmp_path / row["image"]).is_file() for row in rows if "image" in row)
    lines = (tmp_path / "reference/metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(THINGS) * len(ARTISTS)
