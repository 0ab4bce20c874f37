"""The reference: which images are taken, and as what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from latentdiff.data.source import DataConfig
from latentdiff.errors import UserError
from latentdiff.evaluation.reference import open_reference

COLOURS = {"cat": [(200, 0, 0), (250, 0, 0)], "dog": [(0, 200, 0)], "owl": [(0, 0, 200)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats by different artists among others; the first caption is the concept."""
    rows = []
    for name, colours in COLOURS.items():
        for number, colour in enumerate(colours):
            file = f"{number}-{name}.png"
            Image.new("RGB", (30, 20), colour).save(tmp_path / file)
            rows.append({"file_name": file, "text": [f"a {name}", f"{name}, number {number}"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_images_with_one_first_caption_show_one_concept(folder: Path) -> None:
    found = open_reference(DataConfig(path=str(folder)), 300, 16)
    assert sorted(found.prompts) == ["a cat", "a dog", "a owl"]
    shown = [found.prompts[label] for label in found.labels.tolist()]
    for prompt, image in zip(shown, found.images, strict=True):
        assert image.size == (16, 16)
        assert image.getpixel((8, 8)) in COLOURS[prompt.removeprefix("a ")]
    assert shown.count("a cat") == 2 and len(shown) == 4
    assert torch.equal(found.labels, found.labels.sort().values)
    first = {p: i.getpixel((8, 8)) for p, i in zip(found.prompts, found.one_each(), strict=True)}
    assert first == {f"a {name}": colours[0] for name, colours in COLOURS.items()}


def test_fewer_concepts_are_the_first_of_more_with_all_their_images() -> None:
    few, more = (open_reference(DataConfig(), count, 32) for count in (12, 40))
    assert few.prompts == more.prompts[:12] and few.labels.tolist() == list(range(12))
    assert [i.tobytes() for i in few.images] == [i.tobytes() for i in more.images[:12]]


def test_what_cannot_be_read_is_left_out_and_named(folder: Path, capsys) -> None:
    (folder / "0-dog.png").write_bytes(b"no image")
    (folder / "0-cat.png").write_bytes(b"")
    found = open_reference(DataConfig(path=str(folder)), 300, 16)
    assert sorted(found.prompts) == ["a cat", "a owl"] and len(found.images) == 2
    said = capsys.readouterr().out
    assert "0-dog.png" in said and "0-cat.png" in said
    (folder / "0-owl.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"two concepts or more; .* has 1"):
        open_reference(DataConfig(path=str(folder)), 300, 16)
