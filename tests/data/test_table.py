"""Parquet files, saved data sets and hub ids through one table source."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import png, sample_image

from latentdiff.data.images import UnreadableImage
from latentdiff.data.source import DataConfig, Source, open_source
from latentdiff.errors import UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def table(**columns: list[Any]) -> Any:
    features = {
        "image": datasets.Image(), "jpg": datasets.Value("binary"),
        "file": datasets.Value("string"), "text": datasets.Value("string"),
        "n": datasets.Value("int64"),
        "captions": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["tabby_cat", "dog"]),
    }  # fmt: skip
    chosen = datasets.Features({name: features[name] for name in columns})
    return datasets.Dataset.from_dict(columns, features=chosen)


def images(count: int) -> list[dict[str, Any]]:
    return [{"bytes": png(i), "path": None} for i in range(count)]


def open_table(kind: Any, path: Path, **options: Any) -> Any:
    return open_source(DataConfig(kind=kind, path=str(path), **options))


def test_parquet_file_and_folder_of_files_in_order(tmp_path: Path) -> None:
    data = table(image=images(4), text=["a", "b", "c", "d"])
    data.select(range(2)).to_parquet(tmp_path / "p" / "0.parquet")
    data.select(range(2, 4)).to_parquet(tmp_path / "p" / "1.parquet")
    source = open_table("parquet", tmp_path / "p")
    assert isinstance(source, Source)
    assert [source.captions(i) for i in range(4)] == [("a",), ("b",), ("c",), ("d",)]
    assert np.array_equal(np.asarray(source[3].image), np.asarray(sample_image(3)))
    assert len(open_table("parquet", tmp_path / "p" / "1.parquet")) == 2
    assert source.fingerprint() == open_table("parquet", tmp_path / "p").fingerprint()


def test_rows_without_captions_are_reported(tmp_path: Path) -> None:
    table(image=images(4), text=["a", None, " ", "d"]).to_parquet(tmp_path / "a.parquet")
    source = open_table("parquet", tmp_path / "a.parquet")
    assert [source.name(i) for i in range(len(source))] == ["row 0", "row 3"]
    assert source.problems == [("row 1", "no caption"), ("row 2", "no caption")]
    assert np.array_equal(np.asarray(source[1].image), np.asarray(sample_image(3)))


def test_bytes_paths_lists_and_class_labels(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(7))
    table(
        jpg=[png(0), b"broken", None], file=["x.png", "gone.png", None],
        captions=[["a", "b", ""], ["c"], ["d"]], label=[0, 1, 1],
    ).to_parquet(tmp_path / "a.parquet")  # fmt: skip
    path = tmp_path / "a.parquet"
    source = open_table("parquet", path, image_column="jpg", caption_column="captions")
    assert source[0].captions == ("a", "b")
    with pytest.raises(UnreadableImage, match="row 1"):
        source[1]
    with pytest.raises(UnreadableImage, match="row 2: the row has no image"):
        source[2]
    source = open_table("parquet", path, image_column="file", caption_column="label")
    assert source[0].captions == ("tabby cat",)
    assert np.array_equal(np.asarray(source[0].image), np.asarray(sample_image(7)))
    with pytest.raises(UnreadableImage, match=r"gone\.png"):
        source[1]


def test_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    data = table(image=images(3), text=["a", "b", "c"])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([2])).save_to_disk(tmp_path / "two")
    assert len(open_table("hub", tmp_path / "one")) == 3
    assert open_table("hub", tmp_path / "two", split="test")[0].captions == ("c",)
    with pytest.raises(UserError, match=r"it has train, test\. Did you mean 'test'"):
        open_table("hub", tmp_path / "two", split="tests")


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_paths_and_links_out_of_the_data_folder(kind: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "data", tmp_path / "secret.png"
    root.mkdir()
    outside.write_bytes(png(5))
    (root / "x.png").write_bytes(png(7))
    (root / "link.png").symlink_to(outside)
    (root / "near.png").symlink_to("x.png")
    paths = ["x.png", "../secret.png", str(outside), "link.png", "near.png", str(root / "x.png")]
    rows = table(file=paths, text=list("abcdef"))
    rows.save_to_disk(root) if kind == "hub" else rows.to_parquet(root / "a.parquet")
    options = {"image_column": "file"}
    if kind == "hub":  # the library would follow links to tables as well
        with pytest.raises(
            UserError, match=r"link\.png: a link that leaves.*data\.follow_links=true"
        ):
            open_table(kind, root, **options)
        (root / "link.png").unlink()
    source = open_table(kind, root, **options)
    for inside in (0, 4, 5):
        assert np.array_equal(np.asarray(source[inside].image), np.asarray(sample_image(7)))
    for other in (1, 2, 3)[: 2 if kind == "hub" else 3]:
        with pytest.raises(UnreadableImage, match=rf"row {other}.*data\.follow_links=true"):
            source[other]
        followed = open_table(kind, root, follow_links=True, **options)[other].image
        assert np.array_equal(np.asarray(followed), np.asarray(sample_image(5)))


def test_parquet_files_behind_links(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for i, name in enumerate(("data/.parts/0", "other/1", "2")):
        table(image=images(1), text=[str(i)]).to_parquet(tmp_path / f"{name}.parquet")
    (root / "a").symlink_to(".parts")
    (root / "b").symlink_to(tmp_path / "other")
    (root / "c.parquet").symlink_to(tmp_path / "2.parquet")
    source = open_table("parquet", root)
    assert [source.captions(i) for i in range(len(source))] == [("0",)]
    assert [name for name, _ in source.problems] == ["b", "c.parquet"]
    assert all("data.follow_links=true" in reason for _, reason in source.problems)
    every = open_table("parquet", root, follow_links=True)
    assert [every.captions(i) for i in range(3)] == [("0",), ("1",), ("2",)]
    (root / "a").unlink()
    with pytest.raises(UserError, match=r"no \.parquet files.*data\.follow_links=true"):
        open_table("parquet", root)


def test_texts_that_are_not_utf8_are_reported_by_row(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array(["größer".encode(), "größer".encode("cp1252"), b"b", None])
    lists = pa.array([[b"a", b"b"], [b"c", b"\xff"], [], None])
    for stored, kind in ((texts, pa.string()), (lists, pa.list_(pa.string()))):
        columns = {"image": pa.array([png(i) for i in range(4)]), "text": stored.cast(kind, False)}
        pq.write_table(pa.table(columns), tmp_path / f"{kind}.parquet")
    source = open_table("parquet", tmp_path / "string.parquet")
    assert [source.captions(i) for i in range(len(source))] == [("größer",), ("b",)]
    assert source.problems[0][0] == "row 1" and "save it as UTF-8" in source.problems[0][1]
    assert source.problems[1:] == [("row 3", "no caption")]
    source = open_table("parquet", next(tmp_path.glob("list*.parquet")))
    assert [source.captions(i) for i in range(len(source))] == [("a", "b")]
    assert [name for name, _ in source.problems] == ["row 1", "row 2", "row 3"]


@pytest.mark.parametrize("listed", [False, True])
def test_captions_too_large_for_memory_are_not_unpacked(tmp_path: Path, listed: bool) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    repeats = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), ["a " * 2**18])
    if listed:
        repeats = pa.ListArray.from_arrays(pa.array([0, 3000]), repeats)
    columns = {"image": [png(0)] * len(repeats), "text": repeats}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 10**5
    with pytest.raises(
        UserError, match=r"'text' of .*holds 1500 MB, more than the 1024 MB allowed"
    ):
        open_table("parquet", tmp_path / "a.parquet")
    assert not list(tmp_path.glob("hf/**/*.arrow"))


def test_no_row_has_a_mask(tmp_path: Path) -> None:
    rows = table(image=images(2), text=["a", "b"]).add_column("mask", [None, None])
    rows = rows.cast_column("mask", datasets.Image())
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data\.loss_mask=file: no row of .* 'mask'"):
        open_table("parquet", tmp_path / "a.parquet", loss_mask="file")


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table(image=images(1), text=["a"], n=[1]).to_parquet(path)
    for options, words in [
        ({"caption_column": "txt"}, "columns are image, text, n. Did you mean 'text'"),
        ({"image_column": "imag"}, "no column 'imag'.*Did you mean 'image'"),
        ({"image_column": "pixels"}, "Images are in: image"),
        ({"image_column": "n"}, "not images.*Try: image"),
    ]:
        with pytest.raises(UserError, match=words):
            open_table("parquet", path, **options)
    table(image=images(1), text=[""]).to_parquet(path)
    with pytest.raises(UserError, match="0 usable images"):
        open_table("parquet", path)


def test_places_that_do_not_work(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for kind, path, words in [
        ("parquet", tmp_path / "none", "does not exist"),
        ("parquet", tmp_path / "empty", r"no \.parquet files"),
        ("parquet", tmp_path / "bad.parquet", "cannot be read"),
        ("hub", tmp_path / "none", "does not exist"),
        ("hub", tmp_path / "empty", "cannot be loaded in the folder"),
    ]:
        with pytest.raises(UserError, match=words):
            open_table(kind, path)


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Hugging Face hub"):
        open_source(DataConfig(kind="hub", path="nobody/nothing"))
