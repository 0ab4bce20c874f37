"""`latentdiff inspect` of LoRAs, their kin and learned words, as files and as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.cli import inspect as inspect
from latentdiff.cli.inspect import grouped
from latentdiff.formats.embedding import FILE as WORD_FILE
from latentdiff.formats.embedding import write_embedding
from latentdiff.formats.lora import FILE as LORA_FILE
from latentdiff.formats.lora import write_lora
from latentdiff.models.low_rank import LowRank

READS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = "lora_unet_" + READS.replace(".", "_")


def rows(path: Path) -> dict[str, str]:
    return dict(inspect.inspect(path))


def saved(path: Path, tensors: dict[str, Tensor], **metadata: str) -> dict[str, str]:
    save_file(tensors, path, metadata or None)
    return rows(path)


def change(alpha: float = 8.0) -> LowRank:
    return LowRank(torch.zeros(4, 768), torch.zeros(320, 4), alpha)


@pytest.mark.parametrize(
    ("down", "up", "start"),
    [
        ("lora_down", "lora_up", ""),
        ("lora.down", "lora.up", "unet."),
        ("lora_linear_layer.down", "lora_linear_layer.up", "unet."),
        ("lora_A", "lora_B", "base_model.model."),
        ("lora_A.default", "lora_B.default", "base_model.model."),
        ("_lora.down", "_lora.up", "unet."),
    ],
)
def test_every_spelling(down: str, up: str, start: str, tmp_path: Path) -> None:
    layer = start + READS.replace("to_k", "processor.to_k") if down[0] == "_" else start + READS
    dot = "" if down[0] == "_" else "."
    keys = {f"{layer}{dot}{down}.weight": (4, 768), f"{layer}{dot}{up}.weight": (320, 4)}
    found = saved(tmp_path / "l.safetensors", {k: torch.zeros(s) for k, s in keys.items()})
    assert found["what"] == "a LoRA; used beside a model, with --lora FILE"
    assert found["layout"] == ("peft" if "base_model" in start else "diffusers")
    assert (found["rank"], found["changes"]) == ("4", "1 layers of the U-Net")
    assert found["made for"] == "Stable Diffusion 1.x"
    assert found["alpha"].startswith("not stated in the file, which means alpha = rank")


def test_alpha_is_found_wherever_it_is_said(tmp_path: Path) -> None:
    weights = {f"unet.{READS}": change(6), f"unet.{READS[:-1]}v": change(2)}
    for layout in ("diffusers", "kohya"):
        file = write_lora(tmp_path / f"{layout}.safetensors", weights, layout)  # type: ignore[arg-type]
        assert rows(file)["alpha"] == "6, 2", layout
        assert not any("\n" in text for text in rows(file).values())
    peft = {f"base_model.model.{READS}.lora_A.weight": torch.zeros(4, 768)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12}))
    assert saved(tmp_path / "adapter_model.safetensors", peft)["alpha"] == "12"
    # As the file says it, not as it works; and for one layer only.
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"lora_alpha": 16, "use_rslora": True}))
    assert saved(tmp_path / "adapter_model.safetensors", peft)["alpha"].startswith("16, over")
    beside.write_text(json.dumps({"alpha_pattern": {"to_k": 4}}))
    assert saved(tmp_path / "adapter_model.safetensors", peft)["alpha"].startswith("4")
    half = {f"{FLAT}.lora_down.weight": torch.zeros(4, 768), f"{FLAT}.alpha": torch.tensor(3.0)}
    half["lora_unet_conv_in.lora_down.weight"] = torch.zeros(4, 4, 3, 3)
    said = saved(tmp_path / "half.safetensors", half)["alpha"]
    assert said == "3; 1 layers say none, which means alpha = rank"


def test_damaged_settings_are_said_and_the_rest_described(tmp_path: Path) -> None:
    layer = f"unet.{READS}"
    pair = {
        f"{layer}.lora_A.weight": torch.zeros(4, 768),
        f"{layer}.lora_B.weight": torch.zeros(2, 4),
    }
    for text in ("{", "3", '{"unet.lora_alpha": "much"}', '{"unet.lora_alpha": [1]}'):
        found = saved(tmp_path / "l.safetensors", pair, lora_adapter_metadata=text)
        assert "--lora" not in found["what"] and found["rank"] == "4", text


@pytest.mark.parametrize(
    ("kind", "pieces", "rank"),
    [
        ("a LoHa (LyCORIS)", {"hada_w1_a": (320, 5), "hada_w1_b": (5, 768),
                              "hada_w2_a": (320, 5), "hada_w2_b": (5, 768)}, "5"),
        ("a LoKr (LyCORIS)", {"lokr_w1": (4, 8), "lokr_w2_a": (80, 6), "lokr_w2_b": (6, 96)}, "6"),
        ("a LoKr (LyCORIS)", {"lokr_w1": (4, 8), "lokr_w2": (80, 96)}, "not found"),
    ],
)  # fmt: skip
def test_kin_is_named(kind: str, pieces: dict[str, Any], rank: str, tmp_path: Path) -> None:
    tensors = {f"{FLAT}.{name}": torch.zeros(shape) for name, shape in pieces.items()}
    found = saved(tmp_path / "k.safetensors", tensors | {f"{FLAT}.alpha": torch.tensor(2.0)})
    assert found["what"].startswith(f"{kind}; used beside a model, with --lora")
    assert (found["layout"], found["rank"], found["alpha"]) == ("kohya", rank, "2")
    assert found["changes"] == "1 layers of the U-Net"
    assert found["made for"] == "Stable Diffusion 1.x"


def test_a_lora_of_another_family_says_so(tmp_path: Path) -> None:
    name = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, 9)}
    found = saved(tmp_path / "xl.safetensors", tensors)
    assert found["what"].startswith("a LoRA; cannot be used: it is for Stable Diffusion XL")


@pytest.mark.parametrize("word", ["<mine>", "mine", "my.style-2"])
def test_a_learned_word_whatever_it_is_called(word: str, tmp_path: Path) -> None:
    found = rows(write_embedding(tmp_path / "w.safetensors", word, torch.zeros(3, 1024)))
    assert found["what"] == "a textual inversion; used beside a model, with --embedding FILE"
    assert (found["word"], found["vectors"]) == (word, "3 of 1024 numbers")
    assert found["made for"] == "Stable Diffusion 2.x"


def test_what_is_no_learned_word(tmp_path: Path) -> None:
    for name, shape in {"x": (2,), "fc.weight": (3, 768), "y": (1000, 768), "z": ()}.items():
        assert "something unknown" in saved(tmp_path / "x.safetensors", {name: torch.zeros(shape)})[
            "what"
        ], name  # fmt: skip
    xl = {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}
    assert "a textual inversion for SDXL" in saved(tmp_path / "xl.safetensors", xl)["what"]


def test_folders_say_what_the_file_in_them_is(tmp_path: Path, capsys: Any) -> None:
    lora, word, own = tmp_path / "lora", tmp_path / "word", tmp_path / "own"
    file = write_lora(lora / LORA_FILE, {f"unet.{READS}": change()})
    write_lora(lora / "lora_kohya.safetensors", {f"unet.{READS}": change()}, "kohya")
    found, alone = rows(lora), rows(file)
    assert found.pop("beside it").startswith("lora_kohya.safetensors (")
    assert found == alone and str(file) in found["file"]
    write_embedding(word / WORD_FILE, "mine", torch.zeros(1, 768))
    (word / "checkpoints").mkdir()
    assert rows(word)["word"] == "mine" and "beside it" not in rows(word)
    write_lora(own / "style.safetensors", {f"unet.{READS}": change()})
    assert rows(own)["layout"] == "diffusers"
    assert inspect.main([str(tmp_path)]) == 2
    assert f"no LoRA ({LORA_FILE}) and no textual inversion" in capsys.readouterr().err
    (lora / "unet").mkdir()  # a model, of which parts are missing
    assert inspect.main([str(lora)]) == 2
    assert "is not a Stable Diffusion folder: vae" in capsys.readouterr().err


def test_kohyas_keys_are_grouped_by_block() -> None:
    blocks = ["unet_down_blocks_0", "unet_down_blocks_1", "unet_mid_block", "te_text_model_encoder"]
    keys = [
        f"lora_{block}{'_layers' * ('te_' in block)}_{i}_x_to_k.{role}"
        for block in blocks
        for i in range(12)
        for role in ("lora_down.weight", "lora_up.weight", "alpha")
    ]
    assert grouped(keys) == [
        "lora_unet_down_blocks_0_…  (36 keys)",
        "lora_unet_down_blocks_1_…  (36 keys)",
        "lora_unet_mid_block_…  (36 keys)",
        "lora_te_text_model_encoder_layers_…  (36 keys)",
    ]
    peft = [f"base_model.model.{b}.{i}.lora_A" for b in ("down_blocks.0", "up.1") for i in range(5)]
    assert [line.split("…")[0] for line in grouped(peft)] == [
        "base_model.model.down_blocks.0.",
        "base_model.model.up.1.",
    ]
