"""Rows written by several processes are read by any number of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.train.checkpoint import read_tensors, write_tensors

WHOLE = {"w": torch.randn(7, 3), "b": torch.arange(5.0), "step": torch.tensor(3.0)}


def write_pieces(folder: Path, count: int) -> None:
    """Lay WHOLE out as `count` processes would: torch.chunk's rows; numbers in the first file."""
    for rank in range(count):
        pieces, offsets = {}, {}
        for name, value in WHOLE.items():
            parts = value.chunk(count) if value.ndim else (value,)
            if rank < len(parts):
                start = sum(len(part) for part in parts[:rank]) if value.ndim else 0
                pieces[name] = parts[rank].contiguous()
                offsets[name] = {"saved_offsets": [start] + [0] * (value.ndim - 1)}
        file = folder / f"unet-{rank + 1:05d}-of-{count:05d}.safetensors"
        save_file(pieces, file, {"DCP_SHARDING_INFO": json.dumps(offsets)})


@pytest.mark.parametrize("count", [2, 3, 6])
def test_all_rows_come_together(tmp_path: Path, count: int) -> None:
    write_pieces(tmp_path, count)
    for name, value in read_tensors(tmp_path, "unet").items():
        assert torch.equal(value, WHOLE[name]), name


def test_any_rows_can_be_asked_for(tmp_path: Path) -> None:
    write_pieces(tmp_path, 3)
    for start in range(8):
        for stop in range(start, 8):
            found = read_tensors(tmp_path, "unet", lambda key, a=start, b=stop: slice(a, b))
            assert torch.equal(found["w"], WHOLE["w"][start:stop])
            assert torch.equal(found["step"], WHOLE["step"])


def test_one_process_writes_one_plain_file(tmp_path: Path) -> None:
    file = write_tensors(tmp_path, "unet", WHOLE)
    assert file == tmp_path / "unet.safetensors"
    assert all(torch.equal(v, WHOLE[n]) for n, v in read_tensors(tmp_path, "unet").items())
    assert torch.equal(
        read_tensors(tmp_path, "unet", lambda key: slice(2, 4))["w"], WHOLE["w"][2:4]
    )
