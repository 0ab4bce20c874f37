"""A disk that fills up while weights are written: one clear error, and what was there stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from latentdiff.errors import UserError
from latentdiff.formats.embedding import write_embedding
from latentdiff.formats.lora import write_lora
from latentdiff.models.low_rank import LowRank


def full(*_: object) -> None:
    raise SafetensorError("No space left on device (os error 28)")


def test_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    word, lora = tmp_path / "word.safetensors", tmp_path / "lora.safetensors"
    changes = {"unet.conv_in": LowRank(torch.ones(2, 3), torch.ones(4, 2), 2.0)}
    write_embedding(word, "<a>", torch.ones(1, 4))
    write_lora(lora, changes)
    before = word.read_bytes(), lora.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        write_embedding(word, "<a>", torch.zeros(1, 4))
    with pytest.raises(UserError, match="No space left"):
        write_lora(lora, changes)
    assert (word.read_bytes(), lora.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [lora.name, word.name]
