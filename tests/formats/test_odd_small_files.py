"""LoRA and embedding files whose tensors make no sense end in a UserError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.errors import UserError
from latentdiff.formats.embedding_file import read_embedding
from latentdiff.formats.lora_files import read_lora

KOHYA = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "change",
    [
        {f"{KOHYA}.alpha": torch.ones(2)},
        {f"{KOHYA}.lora_down.weight": torch.tensor(1.0)},
    ],
)
def test_lora(tmp_path: Path, change: dict) -> None:
    tensors = {
        f"{KOHYA}.lora_down.weight": torch.ones(2, 4),
        f"{KOHYA}.lora_up.weight": torch.ones(4, 2),
        f"{KOHYA}.alpha": torch.tensor(2.0),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    assert len(read_lora(file).weights) == 1
    save_file(tensors | change, file)
    with pytest.raises(UserError, match="damaged"):
        read_lora(file)


def test_lora_settings(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    assert len(read_lora(file).weights) == 1
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps([1, 2])})
    with pytest.raises(UserError, match="damaged"):
        read_lora(file)


def test_embedding(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"string_to_param": torch.ones(3)}, file)
    with pytest.raises(UserError, match="textual inversion"):
        read_embedding(file)
