"""Files of weights that are something else than their names say, or made to hurt."""

from __future__ import annotations

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from latentdiff.errors import UserError
from latentdiff.formats.embedding import read_embedding
from latentdiff.formats.model import load_model
from latentdiff.tensor_file import LONGEST_NAME, load_content, read_tensor_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def pickled(content: Any, **options: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


WEIGHTS = {
    "safetensors": save(TENSORS),
    "pickle": pickled({"state_dict": TENSORS}),
    "pickle of PyTorch 1.5": pickled(TENSORS, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("ending", [".ckpt", ".bin", ""])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_read_whatever_the_name(kind: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    file.write_bytes(WEIGHTS[kind])
    found = read_tensor_file(file).tensors
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def archive(method: int = zipfile.ZIP_STORED, **files: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as made:
        for name, content in files.items():
            made.writestr(name, content)
    return data.getvalue()


OTHERS = {
    "a Git LFS pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:\n",
    "a web page": b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>",
    "a web page, ": b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    'text file that begins with \'{"error": "Unauthor': b'{"error": "Unauthorised", "status": 401}',
    "a text file that begins with 'Datei nicht gefunden: ä": "Datei nicht gefunden: ä".encode(),
    "is empty": b"",
    "unfinished download": bytes(4096),
    "a PNG image": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "a GGUF file": b"GGUF\3\0\0\0\0\0\0\0",
    "a 7-Zip archive.*Unpack": b"7z\xbc\xaf\x27\x1c\0\4",
    r"a ZIP archive \(model.safetensors\).*Unpack": archive(**{"model.safetensors": b"x"}),
    "a TorchScript program": archive(**{"m/data.pkl": b"x", "m/constants.pkl": b"x"}),
    "an archive that was cut off": WEIGHTS["pickle"][:-30],
    "cut off or damaged": WEIGHTS["safetensors"][:-3],
}


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("words", OTHERS)
def test_what_is_no_file_of_weights_is_named(words: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{ending}"
    file.write_bytes(OTHERS[words])
    with pytest.raises(UserError, match=words) as caught:
        load_model(file)
    assert "could run code" not in str(caught.value)


class Runs:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


class Zeros:
    """Asks for a terabyte when it is unpickled."""

    def __reduce__(self) -> Any:
        return (bytearray, (10**12,))


def test_pickles_are_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(pickled({"a": Runs()}))
    with pytest.raises(UserError, match="could run code"):
        load_model(tmp_path / "model.ckpt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS["pickle"])
    with pytest.raises(UserError, match=r"is a pickle .* Rename it to end in \.ckpt"):
        load_model(tmp_path / "model.safetensors")


def recompressed(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    return archive(zipfile.ZIP_DEFLATED, **files)


def claiming(numbers: int) -> bytes:
    """A pickle whose one storage says that it holds more numbers than it does."""
    with zipfile.ZipFile(io.BytesIO(pickled({"a": torch.ones(3)}))) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    long = pickle.LONG1 + b"\x08" + numbers.to_bytes(8, "little")
    changed = files[name].replace(pickle.BININT1 + b"\x03", long)
    return archive(**files | {name: changed})


def table_with(key: bytes) -> bytes:
    """A pickle of a table whose one key is made by these instructions."""
    return b"\x80\x02}(" + key + b"K\x01u."


def old_row(*more: object) -> bytes:
    """The beginning of a file of PyTorch 1.5, and more values."""
    row = (119547037146038801333356, 1001, {"little_endian": True}, *more)
    return b"".join(pickle.dumps(one, protocol=2) for one in row)


def with_key(key: bytes, again: bool = False) -> bytes:
    """A file of PyTorch with such a table; `again`: another of the same name stands behind it."""
    with zipfile.ZipFile(io.BytesIO(pickled({}))) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    data = io.BytesIO(archive(**files | {name: table_with(key)}))
    if again:
        with zipfile.ZipFile(data, "a") as more, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the name that is there
            more.writestr(name, files[name])
    return data.getvalue()


#: The empty tuple, then 22 times a tuple that holds the one before it twice.
DOUBLED = b")q\x01" + b"h\x01h\x01\x86q\x01" * 22


def unnamed(header: dict[str, Any], size: int = 16) -> bytes:
    """A safetensors file with any header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def entry(*shape: int, dtype: str = "F32", end: int = 16) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


SHARED = torch.zeros(1000)
ROW = torch.zeros(1)
TABLE = {str(i): 1 for i in range(2000)}
HOSTILE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "one number as 12 GB": (
        "12,000,000,000 bytes of memory",
        lambda: pickled({"a": ROW.expand(10**6, 3000)}),
    ),
    "rows over each other": (
        "40,000,000,000 bytes",
        lambda: pickled({"a": torch.zeros(200_000).as_strided((10**5, 10**5), (1, 1))}),
    ),
    "the same numbers many times": (
        "bytes of memory",
        lambda: pickled({f"a{i}": SHARED for i in range(3000)}),
    ),
    "the same table many times": (
        "over 1,000,000 names",
        lambda: pickled({str(i): TABLE for i in range(2000)}),
    ),
    "compressed": (
        "a compressed archive",
        lambda: recompressed(pickled({"a": torch.zeros(10**6)})),
    ),
    "more numbers than there are": ("cut off or damaged", lambda: claiming(3 * 10**9)),
    "a terabyte of bytes": ("cut off or damaged", lambda: pickled({"a": Zeros()})),
    "a key of 2^22 values": ("over 1,000,000 values", lambda: with_key(DOUBLED)),
    "the same, of PyTorch 1.5": (
        "over 1,000,000 values",
        lambda: old_row() + table_with(DOUBLED),
    ),
    "the same, in what follows the data there": (
        "over 1,000,000 values",
        lambda: old_row({}) + table_with(DOUBLED),
    ),
    "the same, with another of its name behind it": (
        "over 1,000,000 values",
        lambda: with_key(DOUBLED, again=True),
    ),
    "sparse": (
        "sparse, quantised or absent",
        lambda: pickled({"a": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))}),
    ),
    "without numbers": (
        "sparse, quantised or absent",
        lambda: pickled({"a": torch.zeros(10**6, 10**6, device="meta")}),
    ),
    "a long name": ("has 1,001 characters", lambda: save({"k" * (LONGEST_NAME + 1): ROW})),
    "a header of 4 GB": ("cut off or damaged", lambda: b"\xff\xff\xff\xff\0\0\0\0{}" + bytes(8)),
    "a shape of 2^80 numbers": ("cut off or", lambda: unnamed({"a": entry(2**40, 2**40)})),
    "a shape larger than the data": ("cut off or damaged", lambda: unnamed({"a": entry(10**9)})),
    "data from beyond the end": ("cut off or damaged", lambda: unnamed({"a": entry(25, end=100)})),
    "the same data twice": (
        "cut off or damaged",
        lambda: unnamed({"a": entry(4), "b": entry(4)}),
    ),
    "a type that is none": ("cut off or damaged", lambda: unnamed({"a": entry(4, dtype="F31")})),
    "a header nested deeply": (
        "cut off or damaged",
        lambda: struct.pack("<Q", 50_006) + b'{"a": ' + b"[" * 50_000,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_made_to_hurt(case: str, tmp_path: Path) -> None:
    words, make = HOSTILE[case]
    (tmp_path / "model.pt").write_bytes(make())
    with pytest.raises(UserError, match=words):
        read_tensor_file(tmp_path / "model.pt")


def test_a_learned_word_of_12_gb(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": ROW.expand(4_000_000, 768)}}, tmp_path / "word.pt")
    with pytest.raises(UserError, match="12,288,000,000 bytes of memory"):
        read_embedding(tmp_path / "word.pt")


def test_tied_and_stepped_tensors_are_no_reason(tmp_path: Path) -> None:
    table = torch.arange(10.0)
    given = {"a": table, "tied": table, "every second": table[::2], "many": table[:1].expand(1000)}
    torch.save(given, tmp_path / "model.ckpt")
    found = read_tensor_file(tmp_path / "model.ckpt").tensors
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_what_is_beside_the_tensors(tmp_path: Path) -> None:
    facts = {"global_step": 5, "name": "mine", "loss": 0.5}
    more = {7: 1, "digits": 10**600, "notes": ["x" * (LONGEST_NAME + 1)]}
    torch.save({"state_dict": TENSORS, **more, **facts}, tmp_path / "model.ckpt")
    assert read_tensor_file(tmp_path / "model.ckpt").facts == facts


def test_tensors_of_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    from random_models import make_pipeline

    from latentdiff.formats.folder import load_components

    make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    content, _ = load_content(weights)
    content["conv_in.bias"] = torch.ones(16, dtype=torch.int64)
    save_file(dict(content), weights)
    with pytest.raises(UserError, match=r"1 not of real numbers: conv_in\.bias"):
        load_components(tmp_path)
