"""Folders as people have them: every caption format, odd names, and the errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import png, sample_image, write_folder

from latentdiff.data import file_tree
from latentdiff.data.folder import repeats
from latentdiff.data.images import UnreadableImage
from latentdiff.data.source import DataConfig, Source, open_source, report_skipped, split
from latentdiff.errors import UserError


def open_folder(path: Path, **options: Any) -> Any:
    return open_source(DataConfig(kind="folder", path=str(path), **options))


def captions_of(source: Source) -> dict[str, tuple[str, ...]]:
    return {source.name(i): source.captions(i) for i in range(len(source))}


def test_jsonl(tmp_path: Path) -> None:
    source = open_folder(write_folder(tmp_path / "d", 3))
    assert isinstance(source, Source)
    assert captions_of(source) == {f"images/{i}.png": (f"image {i}",) for i in range(3)}
    example = source[1]
    assert np.array_equal(np.asarray(example.image), np.asarray(sample_image(1)))
    assert (example.captions, example.name) == (("image 1",), "images/1.png")
    assert source.problems == []


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_any_usual_delimiter_and_a_byte_order_mark(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    rows = [["file_name", "caption"], ["a.png", '"one, two; three"']]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8-sig", newline="")
    assert captions_of(open_folder(tmp_path)) == {"a.png": ("one, two; three",)}


@pytest.mark.parametrize(
    ("table", "captions"),
    [
        ("file_name,text\n0.png,1girl, solo, red hair\n1.png,x", ["1girl, solo, red hair", "x"]),
        ("file_name;text\n0.png;a; b\n1.png;a, b;", ["a; b", "a, b"]),
        ("file_name\ttext\n0.png\ta\tb\n1.png\tc", ["a\tb", "c"]),
        ('file_name, text\n0.png, a, b\n1.png, "c, d"', ["a, b", "c, d"]),
        ('file_name,text,,\n0.png,"a ""b"", c", d,,\n1.png,"e" f, g', ['a "b", c, d', "e f, g"]),
        ('file_name,text\n0.png,"two\nlines, here"\n\n1.png,x', ["two\nlines, here", "x"]),
    ],
)
def test_csv_captions_are_never_cut_at_a_comma(
    tmp_path: Path, table: str, captions: list[str]
) -> None:
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "metadata.csv").write_text(table.replace("\n", end), newline="")
        expected = [text.replace("\n", end) for text in captions]
        source = open_folder(tmp_path)
        assert [source.captions(i) for i in range(2)] == [(text,) for text in expected]


SENTENCE = "eine Katze, größer als ein Hund"


@pytest.mark.parametrize(
    ("text", "encoding", "readable"),
    [
        (SENTENCE, "utf-8", True), (SENTENCE, "utf-8-sig", True),
        (SENTENCE, "utf-16", True), (SENTENCE, "utf-32", True),
        ("\ufeff" + SENTENCE, "utf-16-be", True), ("\ufeff" + SENTENCE, "utf-32-be", True),
        (SENTENCE, "cp1252", False), (SENTENCE, "utf-16-le", False),
        (SENTENCE, "utf-16-be", False), (SENTENCE, "utf-32-le", False),
        ("赤い髪の女の子", "shift_jis", False), ("赤い髪の女の子", "euc_jp", False),
        ("кошка", "cp1251", False), ("红发女孩", "gb18030", False),
    ],
)  # fmt: skip
def test_texts_are_read_in_their_encoding_or_reported_by_image(
    tmp_path: Path, text: str, encoding: str, readable: bool
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_text("fine")
    source = open_folder(tmp_path)
    if readable:
        assert captions_of(source) == {"a.png": (SENTENCE,), "b.png": ("fine",)}
        return
    assert captions_of(source) == {"b.png": ("fine",)}
    [(name, reason)] = source.problems
    assert name == "a.png" and "its caption a.txt" in reason and "save it as UTF-8" in reason


def test_a_table_in_utf_16_as_spreadsheets_save_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_bytes(f"file_name\ttext\na.png\t{SENTENCE}".encode("utf-16"))
    assert captions_of(open_folder(tmp_path)) == {"a.png": (SENTENCE,)}


def test_masks_without_images_are_listed_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    for name in ("cat.jpg", "dog.jpg", "é.png"):
        (tmp_path / name).write_bytes(png(0))
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "Cat.mask.png").write_bytes(png(1))
    (tmp_path / "bird.mask.png").write_bytes(png(1))
    with pytest.raises(UserError, match=r"none of the 3 images.*bird\.mask\.png.*cat\.mask\.png"):
        open_folder(tmp_path, loss_mask="file")
    (tmp_path / "dog.MASK.PNG").write_bytes(png(2))
    (tmp_path / (unicodedata.normalize("NFD", "é") + ".mask.png")).write_bytes(png(3))
    source = open_folder(tmp_path, loss_mask="file")
    masked = {source[i].name for i in range(3) if source[i].mask is not None}
    assert masked == {"dog.jpg", "é.png"}
    assert [name for name, _ in source.problems] == ["Cat.mask.png", "bird.mask.png"]
    assert all("without its image" in reason for _, reason in source.problems)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("a/0.png", "a/deep/1.png", ".store/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(0))
        (root / name).with_suffix(".txt").write_text(name)
    os.symlink("a/deep", root / "b")  # a sub-folder
    os.symlink("../.store", root / "a" / "c")  # one that is only found so
    os.symlink("../..", root / "a" / "up")  # out of the folder
    os.symlink("..", root / "a" / "deep" / "loop")
    os.symlink(root, root / "all")
    os.symlink("0.png", root / "a" / "3.png")
    os.symlink("0.txt", root / "a" / "3.txt")
    source = open_folder(root)
    assert captions_of(source) == {
        "a/0.png": ("a/0.png",), "a/3.png": ("a/0.png",), "a/deep/1.png": ("a/deep/1.png",),
        "b/1.png": ("a/deep/1.png",), "a/c/2.png": (".store/2.png",),
    }  # fmt: skip
    reasons = dict(source.problems)
    assert set(reasons) == {"a/up", "a/deep/loop", "all", "b/loop"}
    assert str(tmp_path) in reasons["a/up"] and "data.follow_links=true" in reasons["a/up"]
    assert "back to a folder" in reasons["all"] and "back to a folder" in reasons["a/deep/loop"]


def test_many_links_between_folders_do_not_multiply(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.png").write_bytes(png(i))
        (tmp_path / str(i) / "x.txt").write_text("x")
        for j in range(12):
            if i != j:
                os.symlink(f"../{j}", tmp_path / str(i) / f"to{j}")
    assert len(open_folder(tmp_path)) == 12 + 12 * 11


def test_links_that_leave_the_folder_are_followed_if_asked_for(tmp_path: Path) -> None:
    root, other = write_folder(tmp_path / "data", 1), tmp_path / "other"
    (root / "metadata.jsonl").unlink()
    (root / "images" / "0.txt").write_text("inside")
    other.mkdir()
    for name, text in (("1", "one"), ("2", "two")):
        (other / f"{name}.png").write_bytes(png(1))
        (other / f"{name}.txt").write_text(text)
    os.symlink(other, root / "far")
    os.symlink(other / "1.png", root / "one.png")
    (root / "one.txt").write_text("an image elsewhere")
    (root / "two.png").write_bytes(png(2))
    os.symlink(other / "2.txt", root / "two.txt")  # such as /proc/self/environ
    os.symlink("..", other / "back")
    inside = open_folder(root)
    assert captions_of(inside) == {"images/0.png": ("inside",)}
    reasons = dict(inside.problems)
    assert set(reasons) == {"far", "one.png", "two.png"}
    assert all("leaves the data folder" in reason for reason in reasons.values())
    assert all("data.follow_links=true" in reason for reason in reasons.values())
    assert captions_of(open_folder(root, follow_links=True)) == {
        "far/1.png": ("one",), "far/2.png": ("two",), "images/0.png": ("inside",),
        "one.png": ("an image elsewhere",), "two.png": ("two",),
    }  # fmt: skip
    (root / "images" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0 usable images of 2.*data\.follow_links=true"):
        open_folder(root)
    os.symlink(other / "2.txt", root / "metadata.csv")
    with pytest.raises(UserError, match=r"metadata\.csv cannot be read.*data\.follow_links=true"):
        open_folder(root)
    for file in (root / "one.png", root / "two.png"):
        file.unlink()
    with pytest.raises(UserError, match=r"no images.*far.*data\.follow_links=true"):
        open_folder(root)


def test_a_folder_that_may_not_be_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scan = write_folder(tmp_path / "d", 1), os.scandir
    (folder / "locked").mkdir()

    def refuse(path: str) -> Any:
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    [(name, reason)] = open_folder(folder).problems
    assert name == "locked/" and "Permission denied" in reason


def test_names_and_captions_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    text = report_skipped([("\x1b[2J.png", "no\ncaption \x9b"), ("\u202egnp.exe", "x")])
    assert text.split("\n")[1:] == [r"  \x1b[2J.png: no\ncaption \x9b", r"  \u202egnp.exe: x"]
    (tmp_path / "\x1b]0;hello\x07.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_text("file_name,text\n\x1b[31m.png,x")
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)
    assert "\x1b" not in str(error.value) and r"\x1b]0;hello\x07.png" in str(error.value)


def test_text_files_beside_the_images_in_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/b.JPG", "deep/er/c.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "deep" / "b.JPG.txt").write_text("three")
    source = open_folder(tmp_path)
    assert captions_of(source) == {"a.png": ("one", "two"), "deep/b.JPG": ("three",)}
    assert source.problems == [("deep/er/c.png", "no caption")]


def test_metadata_in_sub_folders_is_relative_to_them(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", 1)
    write_folder(tmp_path / "y", 1)
    assert set(captions_of(open_folder(tmp_path))) == {"x/images/0.png", "y/images/0.png"}


def test_several_captions_as_a_list_and_as_lines(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"file_name": "images/0.png", "captions": ["a", "b", "", None]},
        {"file_name": "images/1.png", "captions": "c"},
        {"file_name": "images/1.png", "captions": "d"},
    ]
    source = open_folder(write_folder(tmp_path / "d", 2, rows))
    assert captions_of(source) == {"images/0.png": ("a", "b"), "images/1.png": ("c", "d")}


def test_entries_that_cannot_be_used_are_reported_and_left_out(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"file_name": "images/0.png", "text": "fine"},
        {"file_name": "images/1.png", "text": "  "},
        {"file_name": "images/gone.png", "text": "no such file"},
        {"file_name": "../secret.png", "text": "outside"},
        {"text": "no name"},
    ]
    source = open_folder(write_folder(tmp_path / "d", 3, rows))
    assert captions_of(source) == {"images/0.png": ("fine",)}
    reasons = dict(source.problems)
    assert reasons["images/1.png"] == reasons["images/2.png"] == "no caption"
    assert "not in the folder" in reasons["images/gone.png"]
    assert "not in the folder" in reasons["../secret.png"]
    assert reasons["metadata.jsonl entry 5"].startswith("no file_name")
    text = report_skipped(source.problems, limit=2)
    assert text.startswith("5 images are left out") and text.endswith("… and 3 more")
    assert report_skipped([]) == ""


def test_metadata_that_names_a_text_file_says_that_it_is_no_image(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"file_name": "images/0.png", "text": "fine"},
        {"file_name": "images/notes.txt", "text": "what I thought"},
    ]
    folder = write_folder(tmp_path / "d", 1, rows)
    (folder / "images" / "notes.txt").write_text("words")
    [(name, reason)] = open_folder(folder).problems
    assert name == "images/notes.txt"
    assert "its name ends in .txt and not in one of .png, .jpg" in reason
    assert "not in the folder" not in reason


def test_unreadable_image_raises_by_name_and_stays_on_disk(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 2)
    (folder / "images" / "1.png").write_bytes(png(1)[:50])
    source = open_folder(folder)
    with pytest.raises(UnreadableImage, match=r"images/1\.png"):
        source[1]
    assert (folder / "images" / "1.png").exists()
    (folder / "images" / "0.png").unlink()
    with pytest.raises(UnreadableImage, match="cannot be read"):
        source.content_key(0)


def test_names_differing_in_unicode_form_or_slashes_still_match(tmp_path: Path) -> None:
    name = "é.png"
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / unicodedata.normalize("NFD", name)).write_bytes(png(0))
    row = {"file_name": "s\\" + unicodedata.normalize("NFC", name), "text": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert len(open_folder(tmp_path)) == 1


def test_names_that_differ_in_case_or_spaces_still_match_where_only_one_does(
    tmp_path: Path,
) -> None:
    for folder, files in {
        "side": ("IMG_1.JPG", "IMG_2.jpg", "a.png", "A.png", "b.png", "e\u0301.png"),
        "table": ("IMG_1.JPG", "IMG_2.jpg", "a.png", "A.png", "b.png"),
    }.items():
        (tmp_path / folder).mkdir()
        for n, file in enumerate(files):
            (tmp_path / folder / file).write_bytes(png(n))
    side = {"IMG_1.TXT": "one", "img_2.txt": "two", "a.txt": "small", "B.PNG.txt": "b"}
    for name, text in (side | {"\u00e9.txt": "accent"}).items():
        (tmp_path / "side" / name).write_text(text)
    found = open_folder(tmp_path / "side")
    expected = {"IMG_1.JPG": ("one",), "IMG_2.jpg": ("two",), "a.png": ("small",)}
    assert captions_of(found) == expected | {"b.png": ("b",), "e\u0301.png": ("accent",)}
    assert found.problems == [("A.png", "no caption")]  # a.txt is another image's

    rows = [
        "file_name,text",
        "img_1.jpg,one",
        "IMG_2.JPG ,two",
        "a.png,small",
        "A.PNG,x",
        " b.png,b",
    ]
    (tmp_path / "table" / "Metadata.CSV").write_text("\n".join(rows))
    found = open_folder(tmp_path / "table")
    assert captions_of(found) == expected | {"b.png": ("b",)}
    assert [name for name, _ in found.problems] == ["A.PNG", "A.png"]  # either might be meant


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    try:
        with open(root + b"/caf\xe9.png", "wb") as file:
            file.write(png(0))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with open(root + b"/caf\xe9.txt", "w") as file:
        file.write("a café")
    source = open_folder(tmp_path)
    assert captions_of(source) == {"caf\\xe9.png": ("a café",)}
    assert source[0].image.size == (20, 16) and source.fingerprint() and split(source, 0.5)


def test_hidden_files_and_archive_litter_are_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 1)
    for litter in ("images/._0.png", ".cache/x.png", "__MACOSX/y.png"):
        (folder / litter).parent.mkdir(exist_ok=True)
        (folder / litter).write_bytes(b"junk")
    source = open_folder(folder)
    assert len(source) == 1 and source.problems == []


def test_zip_reads_like_its_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 3)
    shutil.make_archive(str(tmp_path / "d"), "zip", folder)
    packed, plain = open_folder(tmp_path / "d.zip"), open_folder(folder)
    assert captions_of(packed) == captions_of(plain)
    assert packed.content_key(2) == plain.content_key(2)
    assert np.array_equal(np.asarray(packed[2].image), np.asarray(plain[2].image))
    assert packed.fingerprint() == open_folder(tmp_path / "d.zip").fingerprint()


def test_damaged_zip_member_is_unreadable_by_name(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("a.txt", "x")
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match=r"a\.png"):
        open_folder(path)[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_data_set(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.zip")
    code = "import sys; from latentdiff.data.file_tree import open_tree; open_tree(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "data.zip")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "must be a folder or a .zip file" in found.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_dead_links_do_not_stop_or_hang_anything(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.txt").write_text("fine")
    os.mkfifo(tmp_path / "b.txt")
    os.symlink("nowhere", tmp_path / "c.txt")
    os.symlink("/dev/zero", tmp_path / "d.txt")
    os.mkfifo(tmp_path / "e.png")
    (tmp_path / "e.txt").write_text("of a pipe")
    source = open_folder(tmp_path)
    assert captions_of(source) == {"a.png": ("fine",)}
    reasons = {}
    for name, reason in source.problems:
        reasons.setdefault(name, reason)
    assert set(reasons) == {"b.png", "c.png", "d.png", "e.png"} and len(source.problems) == 4
    assert "b.txt cannot be read (not a regular file)" in reasons["b.png"]
    assert "c.txt cannot be read" in reasons["c.png"] and "a regular file" in reasons["e.png"]
    assert "data.follow_links=true" in reasons["d.png"]
    assert "a regular file" in dict(open_folder(tmp_path, follow_links=True).problems)["d.png"]


def test_files_larger_than_any_image_are_not_read(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(0))
        (tmp_path / name).with_suffix(".txt").write_text("x")
    os.truncate(tmp_path / "a.png", 2**40)  # a sparse file: it takes no space
    source = open_folder(tmp_path)
    for ask in (source.__getitem__, source.content_key):
        with pytest.raises(UnreadableImage, match=r"a\.png.*more than the 512 MB"):
            ask(0)
    assert source[1].captions == ("x",)


def test_a_zip_member_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = file_tree.ZipTree.read
    monkeypatch.setattr(
        file_tree.ZipTree, "read", lambda tree, name, limit=0: read(tree, name, 2**20)
    )
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**21))
        archive.writestr("metadata.csv", "file_name,text\na.png,x")
    with pytest.raises(UnreadableImage, match=r"a\.png.*2 MB, more than the 1 MB"):
        open_folder(tmp_path / "d.zip")[0]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_more_is_unpacked_than_the_archive_states(tmp_path: Path, method: int) -> None:
    path, text = tmp_path / "d.zip", b"x" * 8_123_457
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", png(0), zipfile.ZIP_STORED)
        archive.writestr("a.txt", text)
    data = path.read_bytes()
    size = struct.pack("<I", len(text))
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, struct.pack("<I", 100)))  # it states 100 bytes
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.png: its caption a\.txt cannot be read"):
        open_folder(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "a.txt"])
def test_texts_too_large_for_memory_are_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, 10 * 2**30)  # a sparse file
    with pytest.raises(UserError, match=rf"{name} cannot be read \(10240 MB, more than the \d+ MB"):
        open_folder(tmp_path)


def test_a_table_in_a_zip_that_would_fill_the_memory_is_not_unpacked(tmp_path: Path) -> None:
    path, text = tmp_path / "d.zip", b'{"file_name": "a.png", "text": "x"}' + b" " * 7777
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(0))
        archive.writestr("metadata.jsonl", text)
    size, data = struct.pack("<I", len(text)), path.read_bytes()
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, struct.pack("<I", 2**32 - 2)))
    words = r"metadata\.jsonl cannot be read \(4096 MB, more than the 1024 MB allowed"
    with pytest.raises(UserError, match=words):
        open_folder(path)


@pytest.mark.parametrize("key", ["file_name", "text", "other"])
def test_nested_metadata_is_an_error_or_no_caption(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    good = {"file_name": "a.png", "text": "x"}
    for depth in (10, *range(800, 1000, 10), 10**5):  # around the limit of Python's recursion
        deep = json.dumps({**good, key: 1}).replace("1", "[" * depth + "]" * depth)
        (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(good)}\n{deep}\n")
        try:
            assert captions_of(open_folder(tmp_path)) == {"a.png": ("x",)}
        except UserError as error:
            assert "line 2 is not JSON" in str(error)
            assert depth > 800


def test_a_damaged_archive_is_an_error_with_its_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a.png", png(0))
    data = bytearray((tmp_path / "d.zip").read_bytes())
    data[data.rindex(b"PK\x01\x02")] ^= 255  # the list of members
    (tmp_path / "d.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"d\.zip is damaged"):
        open_folder(tmp_path / "d.zip")


def test_half_an_emoji_in_a_table(tmp_path: Path) -> None:
    rows = [
        {"file_name": "images/0.png", "text": "a fox \ud83e"},
        {"file_name": "\ud83e.png", "text": "gone"},
    ]
    source = open_folder(write_folder(tmp_path / "d", 1, rows))
    assert captions_of(source) == {"images/0.png": ("a fox ?",)}
    assert len(source.problems) == 1 and source.problems[0][0].encode("utf-8")


def test_fingerprint_follows_images_not_captions(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", 2)
    before = open_folder(folder).fingerprint()
    metadata = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(metadata.replace('"image ', '"photo '))
    assert open_folder(folder).fingerprint() == before
    assert open_folder(folder, background=(0, 0, 0)).fingerprint() != before
    (folder / "images" / "0.png").write_bytes(png(9))
    assert open_folder(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({}, {}, ["no images", "found: nothing"]),
        ({"a.heic": b"x", "b.pdf": b""}, {}, ["no images", "1 × .heic", "convert"]),
        ({"a.png": b"x"}, {}, ["no captions", "metadata.jsonl", "metadata.csv", "cat.txt"]),
        ({"a.png": b"x", "a.txt": b" \n"}, {}, ["no captions"]),
        ({"a.png": b"", "metadata.csv": b"file_name,txet\na.png,x"}, {}, ["txet", "data.caption_"]),
        (
            {"a.png": b"", "metadata.csv": b"file_name,title_en\na.png,x"},
            {"caption_column": "titel_en"},
            ["data.caption_column", "file_name, title_en", "Did you mean 'title_en'"],
        ),
        ({"a.png": b"", "metadata.csv": b"filename,text\na.png,x"}, {}, ["no column file_name"]),
        ({"a.png": b"", "metadata.csv": b"file_name,text\nb.png,x"}, {}, ["0 usable", "b.png"]),
        ({"a.png": b"", "metadata.jsonl": b'{"a": 1}\n{'}, {}, ["metadata.jsonl, line 2", "JSON"]),
        ({"a.png": b"", "metadata.jsonl": b"[1]"}, {}, ["line 1 must be like"]),
        ({"a.png": b"", "metadata.jsonl": b"[" * 10**5}, {}, ["line 1 is not JSON"]),
        ({"a.png": b"", "metadata.jsonl": b"9" * 10**4}, {}, ["line 1 is not JSON"]),
        ({"a.png": b"", "metadata.jsonl": b'{"text": "caf\xe9"}'}, {}, ["not UTF-8"]),
        ({"a.png": b"", "metadata.jsonl": "{}".encode("utf-16-le")}, {}, ["byte order mark"]),
        (
            {"a.png": b"", "metadata.csv": b"text,file_name\nx, y,a.png"},
            {},
            ["metadata.csv, line 2 has 3 cells, its header has 2 (text, file_name)", "quotes"],
        ),
        (
            {"a.png": b"", "metadata.csv": b'file_name,text\na.png,x\nb.png,"y\nc.png,"z"\n'},
            {},
            ["metadata.csv, line 3 is not valid CSV"],
        ),
        ({"a.png": b"", "metadata.csv": b'file_name,text\na.png,"x\nb.png,y'}, {}, ["line 2 is"]),
        ({"a.png": b"x", "a.txt": b"caf\xe9"}, {}, ["0 usable images of 1", "a.png", "not UTF-8"]),
    ],
)
def test_errors_say_what_is_wrong(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, str], words: list[str]
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_folder(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="neither"):
        open_folder(tmp_path / "file")
    with pytest.raises(UserError, match=r"data\.path is required"):
        open_source(DataConfig(kind="folder", path=""))


@pytest.mark.skipif("LATENTDIFF_ASSETS" not in os.environ, reason="LATENTDIFF_ASSETS is not set")
def test_a_real_zip() -> None:
    path = Path(os.environ["LATENTDIFF_ASSETS"]) / "fluent_emoji_3d_128.zip"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    source = open_folder(path)
    assert len(source) == 1853 and source.problems == []
    example = source[0]
    assert example.image.size == (128, 128) and example.captions == ("mahjong red dragon",)
    assert example.image.getpixel((0, 0)) == (255, 255, 255)


def test_an_archive_can_be_sent_to_another_process(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a cat")
    tree = pickle.loads(pickle.dumps(file_tree.ZipTree(str(file))))
    assert tree.names() == ["a.txt"] and tree.read("a.txt") == b"a cat"
    tree._pid = -1  # as in a worker that was forked
    before = tree._archive
    assert tree.read("a.txt") == b"a cat" and tree._archive is not before


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"a.png": None, "a.caption": "one\ntwo"}, {}, {"a.png": ("one", "two")}),
        ({"a.png": None, "a.png.caption": "one"}, {}, {"a.png": ("one",)}),
        ({"a.png": None, "a.txt": "text", "a.caption": "other"}, {}, {"a.png": ("text",)}),
        (
            {"a.png": None, "a.txt": "one,\n\n two \n"},
            {"caption_lines": "joined"},
            {"a.png": ("one, two",)},
        ),
        (
            {"x/red_apple on a_table.png": None, "b.png": None, "b.txt": "not this"},
            {"caption_from": "filename"},
            {"x/red_apple on a_table.png": ("red apple on a table",), "b.png": ("b",)},
        ),
        (
            {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.txt": "a dog runs"},
            {"repeat_folders": True},
            {"10_sks dog/a.png": ("sks dog",), "10_sks dog/b.png": ("a dog runs",)},
        ),
    ],
)
def test_captions_as_other_trainers_users_have_them(
    tmp_path: Path,
    files: dict[str, str | None],
    options: dict[str, Any],
    expected: dict[str, tuple[str, ...]],
) -> None:
    for number, (name, text) in enumerate(files.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(number) if text is None else text.encode())
    assert captions_of(open_folder(tmp_path, **options)) == expected


def test_a_folder_of_kohya_is_told_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "3_toy").mkdir()
    (tmp_path / "3_toy" / "a.png").write_bytes(png(0))
    with pytest.raises(UserError, match=r"captions\. 3_toy looks like kohya's: data\.repeat_f"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("10_sks dog/a.png", (10, "sks dog")),
        ("all/3_cat/b.png", (3, "cat")),
        ("0_cat/b.png", (1, "cat")),
        ("10_x/deeper/a.png", (1, "")),
        ("10_a.png", (1, "")),
        ("dog/10_a.png", (1, "")),
    ],
)
def test_how_often_a_folder_is_repeated(name: str, found: tuple[int, str]) -> None:
    assert repeats(name) == found


@pytest.mark.parametrize("named", ["archive", "its folder"])
def test_metadata_beside_an_archive(tmp_path: Path, named: str) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("x/0.png", png(0))
    (tmp_path / "metadata.csv").write_text("file_name,text\nx/0.png,a cat")
    source = open_folder(tmp_path / "images.zip" if named == "archive" else tmp_path)
    assert captions_of(source) == {"x/0.png": ("a cat",)}
    assert np.array_equal(np.asarray(source[0].image), np.asarray(sample_image(0)))
