"""LoRA files: both layouts, every spelling, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.lora import FILE, kohya_name, read_lora, write_lora
from latentdiff.models.low_rank import LowRank

Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"


def changes(dora: bool = False) -> dict[str, LowRank]:
    """Linear and convolution, ranks and α of their own, α ≠ rank."""
    torch.manual_seed(0)

    def magnitude(count: int) -> Tensor | None:
        return torch.rand(count) if dora else None

    return {
        Q: LowRank(torch.randn(2, 8), torch.randn(8, 2), 6.0, magnitude(8)),
        OUT: LowRank(torch.randn(2, 8), torch.randn(8, 2), 6.0, magnitude(8)),
        CONV: LowRank(torch.randn(4, 8, 3, 3), torch.randn(8, 4, 1, 1), 1.5, magnitude(8)),
        TEXT: LowRank(torch.randn(3, 8), torch.randn(8, 3), 3.0, magnitude(8)),
    }


def assert_same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert found[name].alpha == change.alpha, name
        assert torch.equal(found[name].down, change.down), name
        assert torch.equal(found[name].up, change.up), name
        assert (found[name].magnitude is None) == (change.magnitude is None)
        if change.magnitude is not None:
            assert torch.equal(found[name].magnitude, change.magnitude), name


@pytest.mark.parametrize("dora", (False, True))
def test_diffusers_layout_round_trip(tmp_path: Path, dora: bool) -> None:
    file = write_lora(tmp_path / "new" / FILE, changes(dora), metadata={"author": "me"})
    read = read_lora(file.parent)
    assert_same(read.weights, changes(dora))
    assert read.metadata["author"] == "me"
    assert [p.name for p in file.parent.iterdir()] == [FILE]


@pytest.mark.parametrize("dora", (False, True))
def test_kohya_layout_round_trip(tmp_path: Path, dora: bool) -> None:
    file = write_lora(tmp_path / "style.safetensors", changes(dora), "kohya")
    read = read_lora(file)
    named = {kohya_name(*name.split(".", 1)): change for name, change in changes(dora).items()}
    assert_same(read.weights, named)
    keys = set(load_file(file))
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in keys
    assert "lora_unet_down_blocks_0_resnets_0_conv1.alpha" in keys


def test_sixteen_bit_keeps_alpha_exact(tmp_path: Path) -> None:
    given = {Q: LowRank(torch.randn(3, 8), torch.randn(8, 3), 3**0.5)}
    for layout in ("diffusers", "kohya"):
        file = write_lora(tmp_path / f"{layout}.safetensors", given, layout, torch.float16)  # type: ignore[arg-type]
        (found,) = read_lora(file).weights.values()
        assert found.down.dtype == torch.float16
        assert found.alpha == pytest.approx(3**0.5, abs=1e-7)


def test_earlier_spellings_mean_the_same(tmp_path: Path) -> None:
    q, out, text = (changes()[name] for name in (Q, OUT, TEXT))
    attention = Q.removesuffix(".to_q")
    state = {
        f"{attention}.processor.to_q_lora.down.weight": q.down,
        f"{attention}.processor.to_q_lora.up.weight": q.up,
        f"{OUT}.lora.down.weight": out.down,
        f"{OUT}.lora.up.weight": out.up,
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (
            text.down
        ),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (
            text.up
        ),
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight": text.down + 0,
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.up.weight": text.up + 0,
    }
    save_file(state, tmp_path / "old.safetensors")
    found = read_lora(tmp_path / "old.safetensors").weights
    assert found.keys() == {Q, OUT, TEXT, "text_encoder.encoder.layers.1.self_attn.out_proj"}
    assert all(change.alpha == change.rank for change in found.values())
    # Without a prefix, and as a pickle of tensors.
    bare = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
    torch.save(bare, tmp_path / "old.bin")
    assert read_lora(tmp_path / "old.bin").weights.keys() == {Q, OUT}


def test_what_peft_saves_by_itself(tmp_path: Path) -> None:
    q = changes()[Q]
    name = Q.replace("unet.", "base_model.model.")
    state = {f"{name}.lora_A.weight": q.down, f"{name}.lora_B.weight": q.up}
    save_file(state, tmp_path / "adapter_model.safetensors")
    facts = {"r": 2, "lora_alpha": 4, "use_rslora": True, "alpha_pattern": {"attn1.to_q": 16}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    (found,) = read_lora(tmp_path).weights.items()
    assert found[0] == Q
    assert found[1].scale == pytest.approx(16 / 2**0.5)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        read_lora(path)
    for word in (str(path), *words):
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    "key, words",
    {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": ("Stable Diffusion XL",),
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight": (
            "Stable Diffusion XL",
        ),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": ("Flux",),
        "transformer.blocks.0.attn.to_q.lora_A.weight": ("transformer",),
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": ("Flux",),
        "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": ("diffusion transformer",),
        "diffusion_model.label_emb.0.0.lora_up.weight": ("Stable Diffusion XL",),
        "text_encoders.clip_g.transformer.text_model.x.lora_up.weight": ("Stable Diffusion XL",),
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.lora_up.weight": (
            "embedding table",
        ),
        "lora_unet_mid_block_attentions_0_proj_in.oft_diag": ("OFT",),
        "lora_unet_mid_block_attentions_0_proj_in.ia3_w": ("IA3",),
        "unet.mid_block.attentions.0.proj_in.lora_B.bias": ("biases",),
        "unet.mid_block.attentions.0.proj_in.lora_B.default.bias": ("biases",),
        "model.diffusion_model.input_blocks.0.0.weight": ("no LoRA file", "--model"),
        f"{Q}.lora_A.weight": ("only half", Q),
        f"{Q}.lora_wings": ("no part of a LoRA", f"{Q}.lora_wings"),
    }.items(),
)
def test_other_kinds_are_named(tmp_path: Path, key: str, words: tuple[str, ...]) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", *words)


def test_damaged_files(tmp_path: Path) -> None:
    file = write_lora(tmp_path / "whole.safetensors", changes())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    refused(cut, "cannot be read")
    refused(tmp_path / "none.safetensors", "no LoRA file")


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_in_a_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps({"a": Code()}))
    refused(evil)
    assert not (tmp_path / "ran").exists()
