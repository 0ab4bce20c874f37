"""A quarantine list leaves out what it names, and nothing else about the data changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_folder

from latentdiff.data.quarantine import Unquarantined, read_quarantine, write_quarantine
from latentdiff.data.source import DataConfig, Source, open_source, problems_of, split
from latentdiff.errors import UserError, printable


def listing(folder: Path, *names: str) -> str:
    file = folder / "q.jsonl"
    write_quarantine(file, [(name, "because") for name in names])
    return str(file)


def test_any_name_and_reason_comes_back(tmp_path: Path) -> None:
    entries = {"a/é\n\u2028.png": "two\nlines", '"\\': "", "\u202ex": "猫"}
    assert write_quarantine(tmp_path / "q", entries.items()) == 3
    assert read_quarantine(tmp_path / "q") == entries | {'"\\': "listed"}


def test_a_list_by_hand(tmp_path: Path) -> None:
    (tmp_path / "q").write_text('\ufeff{"name": "a"}\n\n{"name": "b", "size": 3}\r\n', "utf-8")
    assert read_quarantine(tmp_path / "q") == {"a": "listed", "b": "listed"}


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '"a"', '{"file": "a"}', '{"name": 3}', "3", "[" * 10**5, "9" * 5000],
    ids=lambda line: line[:9],
)
def test_a_line_that_is_no_entry_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "q").write_text('{"name": "a"}\n' + line)
    with pytest.raises(UserError, match=r"data\.quarantine.*line 2 must be like"):
        read_quarantine(tmp_path / "q")


def test_a_list_that_is_not_there_stops_the_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 1)
    with pytest.raises(UserError, match=r"data\.quarantine: nowhere.* cannot be read"):
        open_source(DataConfig(kind="folder", path=str(folder), quarantine="nowhere"))


def test_listed_images_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 5)
    (folder / "images" / "extra.png").write_bytes(b"")
    names = ("images/1.png", "images/3.png", "images/extra.png", "not/there.png")
    config = DataConfig(kind="folder", path=str(folder))
    whole = open_source(config)
    source = open_source(
        DataConfig(kind="folder", path=str(folder), quarantine=listing(tmp_path, *names))
    )
    assert isinstance(source, Source) and len(source) == 3
    assert [source.name(i) for i in range(3)] == [f"images/{i}.png" for i in (0, 2, 4)]
    for mine, theirs in ((0, 0), (1, 2), (2, 4)):
        assert source.captions(mine) == whole.captions(theirs)
        assert np.array_equal(np.asarray(source[mine].image), np.asarray(whole[theirs].image))
        assert source.content_key(mine) == whole.content_key(theirs)  # type: ignore[attr-defined]
    assert dict(problems_of(source)) == {
        "images/extra.png": "no caption",
        "images/1.png": "quarantined: because",
        "images/3.png": "quarantined: because",
        "not/there.png": f"in {tmp_path / 'q.jsonl'}, but not in the data",
    }


def test_the_split_of_the_others_stays(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 40)
    whole = open_source(DataConfig(kind="folder", path=str(folder)))
    listed = listing(tmp_path, "images/7.png", "images/8.png")
    source = open_source(DataConfig(kind="folder", path=str(folder), quarantine=listed))
    held_out = {whole.name(i) for i in split(whole, 0.3)[1]} - {"images/7.png", "images/8.png"}
    assert {source.name(i) for i in split(source, 0.3)[1]} == held_out


def test_the_fingerprint_follows_the_list(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 4)

    def fingerprint(*names: str) -> str:
        listed = listing(tmp_path, *names)
        return open_source(
            DataConfig(kind="folder", path=str(folder), quarantine=listed)
        ).fingerprint()

    assert fingerprint("images/1.png") == fingerprint("images/1.png", "unknown")
    assert len({fingerprint("images/1.png"), fingerprint("images/2.png"), fingerprint()}) == 3


def test_optional_methods_are_there_only_if_the_source_has_them(tmp_path: Path) -> None:
    """Those of the folder source; a source without them gets none."""
    folder = write_folder(tmp_path / "d", 3)
    source = open_source(DataConfig(kind="folder", path=str(folder)))
    assert hasattr(source, "content_key") and hasattr(source, "read")
    kept = Unquarantined(source, {source.name(0): "bad"}, "list")
    assert kept.content_key(0) == source.content_key(1) and kept.read(0) == source.read(1)

    class Bare:
        __len__, captions, name = source.__len__, source.captions, source.name

    bare = Unquarantined(Bare(), {source.name(0): "bad"}, "list")
    assert not hasattr(bare, "content_key") and not hasattr(bare, "read")


def test_a_list_of_everything_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 2)
    listed = listing(tmp_path, "images/0.png", "images/1.png")
    with pytest.raises(UserError, match="lists all 2 images"):
        open_source(DataConfig(kind="folder", path=str(folder), quarantine=listed))


def test_rows_of_a_table_are_listed_by_number(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [b"x", b"y", b"z"], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "t.parquet"))
    (tmp_path / "q").write_text(json.dumps({"name": "row 1"}))
    source = open_source(
        DataConfig(kind="parquet", path=str(tmp_path / "t.parquet"), quarantine=str(tmp_path / "q"))
    )
    assert [source.captions(i) for i in range(len(source))] == [("a",), ("c",)]
    assert source.read(1) == b"z"  # type: ignore[attr-defined]


def test_lists_do_not_act_on_the_terminal_and_keep_their_names(tmp_path: Path) -> None:
    names = [
        "\x1b[2J.png",
        "\x9b31m.png",
        "\u202egnp.exe",
        "a\u2028b\x7f.png",
        "é 猫 👩\u200d🚀.png",
    ]
    write_quarantine(tmp_path / "q.jsonl", [(name, name) for name in names])
    text = (tmp_path / "q.jsonl").read_text("utf-8")
    assert all(printable(line) == line for line in text.split("\n"))
    assert names[-1] in text
    assert read_quarantine(tmp_path / "q.jsonl") == {name: name for name in names}
