"""Tar shards: which members make a sample, damaged shards, and the same latents as a folder's."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from data_helpers import png, write_folder
from test_latent_cache import StubAutoencoder, config_of

from latentdiff.data.captions import Texts
from latentdiff.data.latents import build_latent_cache
from latentdiff.data.source import DataConfig, Source, open_source
from latentdiff.errors import UserError


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: range) -> list[tuple[str, bytes]]:
    found = []
    for n in numbers:
        found += [(f"{n:04}.png", png(n)), (f"{n:04}.txt", f"image {n}\nalso {n}".encode())]
    return found


def config(path: Path, **options: object) -> DataConfig:
    settings = {"kind": "webdataset", "path": str(path), "image_size": 16, **options}
    return DataConfig(**settings)  # type: ignore[arg-type]


def test_shards_read_as_a_folder_does(tmp_path: Path) -> None:
    shard(tmp_path / "s" / "b.tar", samples(range(3, 6)))
    shard(tmp_path / "s" / "a.tar", samples(range(3)))
    source = open_source(config(tmp_path / "s"))
    assert isinstance(source, Source) and len(source) == 6
    assert [source.name(i) for i in (0, 5)] == ["a/0000", "b/0005"]
    assert source.captions(4) == ("image 4", "also 4")
    folder = config_of(write_folder(tmp_path / "d"))
    as_files = open_source(folder)
    for i in range(6):
        assert source[i].image.tobytes() == as_files[i].image.tobytes()
    made = build_latent_cache(
        source, StubAutoencoder(), config(tmp_path / "s"), tmp_path / "c", progress=False
    )
    model = StubAutoencoder()  # the images' bytes are the same, so nothing is encoded again
    again = build_latent_cache(as_files, model, folder, tmp_path / "c", progress=False)
    assert model.batches == []
    assert torch.equal(made.read(range(6)).moments, again.read(range(6)).moments)
    single = open_source(config(tmp_path / "s" / "b.tar"))
    pattern = open_source(config(tmp_path / "s" / "*.tar"))
    assert len(single) == 3 and pattern.fingerprint() == source.fingerprint()
    shard(tmp_path / "s" / "b.tar", samples(range(3, 7)))
    assert open_source(config(tmp_path / "s")).fingerprint() != source.fingerprint()


def test_odd_samples(tmp_path: Path) -> None:
    row = json.dumps({"caption": "from json", "de": "aus json"}).encode()
    path = shard(
        tmp_path / "a.tar",
        [
            ("x/1.v2.jpg", b"the ending is v2.jpg, which is no image"),
            ("x/2.png", png(2)),
            ("x/2.json", row),
            ("x/3.png", png(3)),
            ("y/3.txt", b"another folder, another sample"),
            ("4.txt", b"no image"),
            ("5.png", png(5)),
            ("5.txt", b"  \n"),
            ("6.png", png(6)),
            ("6.json", b"{"),
            ("7.PNG", png(7)),
            (".DS_Store", b"between two files of one sample"),
            ("7.txt", "größer".encode()),
        ],
    )
    source = open_source(config(path))
    assert [source.captions(i) for i in range(len(source))] == [("from json",), ("größer",)]
    problems = dict(source.problems)  # type: ignore[attr-defined]
    assert set(problems) == {"a/x/1", "a/x/3", "a/y/3", "a/4", "a/5", "a/6"}
    assert open_source(config(path, caption_column="de")).captions(0) == ("aus json",)


def test_a_shard_cut_off_in_the_middle_keeps_what_is_whole(tmp_path: Path) -> None:
    whole = shard(tmp_path / "whole.tar", samples(range(8)))
    data = whole.read_bytes()
    for size in (9216, 9216 + 100, 9216 + 700, 9216 + 1500):  # between, in a header, in an image
        (tmp_path / "cut.tar").write_bytes(data[:size])
        source = open_source(config(tmp_path / "cut.tar"))
        assert 2 <= len(source) < 8
        for i in range(len(source)):
            assert source[i].image.size == (20, 16)
        assert "cut.tar" in dict(source.problems)  # type: ignore[attr-defined]
    whole_source = open_source(config(whole))
    assert len(whole_source) == 8
    assert not whole_source.problems  # type: ignore[attr-defined]
    whole.unlink()
    with pytest.raises(Exception, match="whole/0000"):
        _after_deletion(tmp_path)


def _after_deletion(tmp_path: Path) -> None:
    path = shard(tmp_path / "whole.tar", samples(range(1)))
    source = open_source(config(path))
    path.unlink()
    source[0]


def test_refusals(tmp_path: Path) -> None:
    for name, match in (("none", "no .tar shards"), ("x.tar.gz", "plain .tar"), ("e.tar", "0 us")):
        if name == "x.tar.gz":
            (tmp_path / name).write_bytes(b"")
        if name == "e.tar":
            shard(tmp_path / name, [])
        with pytest.raises(UserError, match=match):
            open_source(config(tmp_path / name))
    (tmp_path / "bad.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(UserError, match=r"bad\.tar: cannot be read"):
        open_source(config(tmp_path / "bad.tar"))


BAD_CAPTIONS = {
    "cp1252": ("txt", "größer".encode("cp1252"), "save it as UTF-8"),
    "utf-16 without a mark": ("txt", "größer".encode("utf-16-le"), "save it as UTF-8"),
    "over the limit": ("txt", b"a " * 2**20, "2 MB, more than the 1 MB allowed"),
    "json over the limit": ("json", b'{"text": "' + b"a" * 2**21 + b'"}', "more than the 1 MB"),
    "deep json": ("json", b"[" * 10**5, "recursion"),
    "long number": ("json", b'{"text": ' + b"9" * 5000 + b"}", "4300 digits"),
    "no object": ("json", b"[1]", "not an object"),
}


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_captions_that_cannot_be_read_are_reported(case: str, tmp_path: Path) -> None:
    ending, data, words = BAD_CAPTIONS[case]
    members = [("a.png", png(0)), (f"a.{ending}", data), *samples(range(1))]
    source = open_source(config(shard(tmp_path / "s.tar", members)))
    [(name, reason)] = source.problems  # type: ignore[attr-defined]
    assert len(source) == 1 and name == "s/a" and words in reason


def test_captions_follow_their_byte_order_mark(tmp_path: Path) -> None:
    members = [("0.png", png(0)), ("0.txt", "größer".encode("utf-16")), ("1.png", png(1))]
    members += [("1.json", json.dumps({"text": "größer"}).encode("utf-8-sig"))]
    source = open_source(config(shard(tmp_path / "a.tar", members)))
    assert [source.captions(i) for i in range(2)] == [("größer",), ("größer",)]


def test_a_caption_cut_off_with_its_shard_is_not_used(tmp_path: Path) -> None:
    members = [*samples(range(1)), ("b.png", png(1)), ("b.txt", b"words " * 99)]
    data = shard(tmp_path / "s.tar", members).read_bytes()
    (tmp_path / "s.tar").write_bytes(data[: data.rindex(b"words")])
    source = open_source(config(tmp_path / "s.tar"))
    assert len(source) == 1
    assert "the shard ends" in dict(source.problems)["s/b"]  # type: ignore[attr-defined]


def test_shards_behind_links(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("data/.parts", "other"):
        (tmp_path / name).mkdir(parents=True)
    shard(root / ".parts" / "a.tar", samples(range(1)))
    shard(tmp_path / "other" / "b.tar", samples(range(1, 3)))
    (root / "x").symlink_to(".parts")
    (root / "y").symlink_to(tmp_path / "other")
    (root / "z.tar").symlink_to(tmp_path / "other" / "b.tar")
    source = open_source(config(root))
    reasons = dict(source.problems)  # type: ignore[attr-defined]
    assert len(source) == 1 and set(reasons) == {"y", "z.tar"}
    assert all("data.follow_links=true" in reason for reason in reasons.values())
    assert len(open_source(config(root, follow_links=True))) == 5


def test_masks_in_shards(tmp_path: Path) -> None:
    members = [*samples(range(1)), ("0000.mask.png", png(9))]
    source = open_source(config(shard(tmp_path / "a.tar", members), loss_mask="file"))
    plain = open_source(config(tmp_path / "a.tar"))
    # In the order of their names the mask comes first: it is not taken for the image.
    sorted_members = sorted(members)
    assert sorted_members[0][0] == "0000.mask.png"
    again = open_source(config(shard(tmp_path / "c.tar", sorted_members)))
    assert again[0].image.tobytes() == plain[0].image.tobytes() == source[0].image.tobytes()
    mask = source[0].mask
    assert mask is not None and mask.mode == "L" and mask.size == (20, 16)
    assert open_source(config(tmp_path / "a.tar"))[0].mask is None
    members = [*samples(range(1)), ("0001.mask.png", png(9))]
    with pytest.raises(UserError, match=r"none of the 1 images .*0001\.mask\.png for 0001\.jpg"):
        open_source(config(shard(tmp_path / "b.tar", members), loss_mask="file"))
    members = [("0000.mask.png", png(9)), *members]
    source = open_source(config(shard(tmp_path / "b.tar", members), loss_mask="file"))
    assert source.problems == [("b/0001", "a mask without its image")]  # type: ignore[attr-defined]


def test_texts_round_trip() -> None:
    texts, given = Texts(), [("a", "ä€😀"), ("",), ("bad \udce9", "b"), ("one\x1ftwo",)]
    for item in given:
        texts.append(item)
    assert [texts[i] for i in range(4)] == [*given[:3], ("one two",)]
    for wrong in (-1, 4):
        with pytest.raises(IndexError):
            texts[wrong]
