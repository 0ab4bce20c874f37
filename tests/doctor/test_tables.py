"""Counts of a data set, and counting tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latentdiff.doctor.records import READABLE, RECORD, Records, open_counter
from latentdiff.doctor.tables import (
    RATIOS,
    bucket_sides,
    bucket_table,
    caption_table,
    mode_table,
    size_table,
)
from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.models.tokenizer import load_tokenizer


def records_of(sizes: list[tuple[int, int]], **facts: object) -> Records:
    records = Records(len(sizes))
    for i, (width, height) in enumerate(sizes):
        row = {"width": width, "height": height, "flags": READABLE, "mode": "RGB", "format": "PNG"}
        records.put(i, row | facts, None)
    return records


def test_an_image_counts_for_the_nearest_ratio() -> None:
    sizes = [(w * 100, h * 100) for w, h in RATIOS] + [(101, 100), (1, 9000), (9000, 1)]
    table = {row.label: row for row in bucket_table(records_of(sizes), 64)}
    expected = {f"{w}:{h}": 1 for w, h in RATIOS} | {"1:1": 2, "1:3": 2, "3:1": 2}
    assert {label: row.images for label, row in table.items()} == expected
    assert "cuts 50% away" in table["2:1"].remark and "cuts 50% away" in table["1:2"].remark


@pytest.mark.parametrize("size", [64, 256, 512])
def test_buckets_have_about_the_area_of_the_square(size: int) -> None:
    for w, h in RATIOS:
        width, height = bucket_sides(w / h, size)
        assert width % 8 == height % 8 == 0
        assert width * height == pytest.approx(size * size, rel=32 / size)
        assert width / height == pytest.approx(w / h, rel=32 / size)
        assert (height, width) == bucket_sides(h / w, size)


def test_unreadable_images_are_in_no_table() -> None:
    records = records_of([(10, 10), (20, 20)])
    records.put(0, {"flags": 0}, "broken")
    for rows in (bucket_table(records, 64), mode_table(records), size_table(records)):
        assert sum(row.images for row in rows) == 1
    nothing = Records(0)
    assert bucket_table(nothing, 64) == mode_table(nothing) == size_table(nothing) == []


def test_sizes_and_captions_by_powers_of_two() -> None:
    records = records_of([(64, 900), (127, 127), (128, 500)])
    records.table["longest"], records.table["too_long"] = [7, 8, 90], [0, 0, 1]
    assert [(r.label, r.images) for r in size_table(records)] == [
        ("64…127 pixels", 2),
        ("128…255 pixels", 1),
    ]
    counted = [(r.label, r.images) for r in caption_table(records, open_counter("embedded", 77))]
    assert counted == [
        ("4…7 tokens", 1),
        ("8…15 tokens", 1),
        ("64…127 tokens", 1),
        ("over 77 tokens", 1),
    ]


def test_a_record_stays_small() -> None:
    assert RECORD.itemsize <= 112


def test_tokens_are_counted_by_the_tokenizer_that_is_named() -> None:
    folder = Path(EMBEDDED_MODEL)
    text = "a fox, 12 'quoted' words and the end"
    limit = json.loads((folder / "text_encoder/config.json").read_text())["max_position_embeddings"]
    expected = load_tokenizer(folder / "tokenizer", limit).count(text)
    for name in ("embedded", str(folder), str(folder / "tokenizer")):
        counter = open_counter(name, None)
        assert counter.limit == limit and counter.count(text) == expected
    assert open_counter("embedded", 50).limit == 50


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        open_counter(str(tmp_path), None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        open_counter(str(tmp_path), None)


#: Text → what CLIP's own tokenizer (vocabulary of 49,408) makes of it, marks included.
CLIP_COUNTS = {
    "": 2,
    "a photo of a cat": 7,
    "Ein kleiner Hund läuft über die grüne Wiese und bellt": 22,
    "猫が窓辺で眠っている": 23,
    "кошка спит на диване у окна": 29,
    "masterpiece, best quality, 1girl, solo, long hair, looking at viewer, (blue eyes:1.2)": 27,
}


@pytest.mark.parametrize("text", CLIP_COUNTS)
def test_without_a_folder_clips_own_tokenizer_counts(text: str) -> None:
    counter = open_counter(None, None)
    assert (counter.count(text), counter.limit) == (CLIP_COUNTS[text], 77)
    assert "not on this machine" not in counter.words


def test_any_text_can_be_counted() -> None:
    count = open_counter(None, None).count
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(map(chr, rng.integers(0, 0xD7FF, 60)))
        assert 2 <= count(text) <= 2 + len(text.encode())
    assert count("a \ud83e") == count("a ?")
