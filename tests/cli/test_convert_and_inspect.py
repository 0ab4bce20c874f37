"""`latentdiff convert` and `latentdiff inspect` as they are typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.cli import convert as convert
from latentdiff.cli import inspect as inspect
from latentdiff.cli.inspect import grouped, size
from latentdiff.formats.folder import load_components
from latentdiff.formats.lora import write_lora
from latentdiff.formats.model import load_model
from latentdiff.models.low_rank import LowRank, layers_of
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from tests.random_models import make_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    file = folder.with_name("model.safetensors")
    assert convert.main([str(folder), str(file), "--dtype", "float16", "--title", "Mine"]) == 0
    return file


def rows(capsys: Any, *arguments: str) -> dict[str, str]:
    assert inspect.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line[0] != " "}


def test_convert_to_a_file_and_back(folder: Path, file: Path, tmp_path: Path, capsys: Any) -> None:
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    assert convert.main([str(file), str(tmp_path / "again"), "--prediction", "v"]) == 0
    assert f"wrote {tmp_path / 'again'}" in capsys.readouterr().out
    again, first = load_components(tmp_path / "again"), load_components(folder)
    assert again.prediction == "v"
    expected = first.unet.conv_in.weight.half().float()
    assert torch.equal(again.unet.conv_in.weight, expected)


def test_what_is_left_out_is_listed(file: Path, tmp_path: Path, capsys: Any) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    extra = {"betas": torch.zeros(3), **{f"model_ema.a{i}": torch.zeros(1) for i in range(9)}}
    save_file(load_file(file) | extra, tmp_path / "m.safetensors", metadata)
    assert convert.main([str(tmp_path / "m.safetensors"), str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert "left out 10 keys" in printed and "  betas" in printed


def test_nothing_is_written_where_something_is_wrong(
    folder: Path, file: Path, tmp_path: Path, capsys: Any
) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-10])
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    for arguments, words in (
        ([cut, tmp_path / "out"], "cut off or damaged"),
        ([folder, tmp_path / "out.ckpt"], "ends in .safetensors"),
        ([folder, taken], "exists"),
        ([folder, folder], "the same"),
        ([tmp_path / "none.ckpt", tmp_path / "out"], "does not exist"),
        ([folder, tmp_path / "out", "--variant", "fp16"], "expected diffusion_pytorch_model.fp16"),
    ):
        assert convert.main([str(a) for a in arguments]) == 2
        assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.safetensors", "taken.safetensors"]
    assert convert.main([str(folder), str(taken), "--overwrite"]) == 0


def test_inspect_a_checkpoint_and_a_folder(folder: Path, file: Path, capsys: Any) -> None:
    found = rows(capsys, str(file))
    assert "latentdiff" in found["what"] and "opens here" in found["what"]
    assert found["dtype"].startswith("float16") and found["prediction"] == "epsilon"
    assert (found["title"], found["architecture"]) == ("Mine", "latentdiff")
    found = rows(capsys, str(folder))
    assert found["prediction"] == "epsilon" and found["unet"].startswith("float32")
    found = rows(capsys, str(file), "--keys")
    assert found["keys"].startswith("cond_stage_model.transformer.text_model.embeddings.position")


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_inspect_a_lora(layout: str, tmp_path: Path, capsys: Any) -> None:
    flat = layout == "kohya"
    unet, text = ("lora_unet_", "lora_te_") if flat else ("unet.", "text_encoder.")
    down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    reads = "down_blocks_0_attn2_to_k" if flat else "down_blocks.0.attn2.to_k"
    tensors = {
        f"{unet}{reads}.{down}.weight": torch.zeros(4, 768),
        f"{unet}{reads}.{up}.weight": torch.zeros(320, 4),
        f"{text}layers_0_q_proj.{down}.weight": torch.zeros(4, 768),
    } | ({f"{unet}{reads}.alpha": torch.tensor(2.0)} if flat else {})
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_num_epochs": "7"} if flat else None)
    found = rows(capsys, str(tmp_path / "lora.safetensors"))
    assert found["what"].startswith("a LoRA") and found["layout"] == layout and found["rank"] == "4"
    assert "1 layers of the U-Net, 1 layers of the text encoder" in found["changes"]
    assert "Stable Diffusion 1.x" in found["made"]
    if flat:
        assert found["alpha"].startswith("2; 1 layers say none") and found["ss_num_epochs"] == "7"


def test_inspect_what_does_not_open(tmp_path: Path, capsys: Any) -> None:
    key = "conditioner.embedders.1.model.ln_final.weight"
    save_file({key: torch.zeros(2)}, tmp_path / "xl.safetensors")
    assert (
        "Stable Diffusion XL; does not open"
        in rows(capsys, f"{tmp_path / 'xl.safetensors'}")["what"]
    )
    assert inspect.main([str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "x"}, tmp_path / "ti.pt")
    assert "a textual inversion" in rows(capsys, str(tmp_path / "ti.pt"))["what"]


def test_lists_in_few_lines() -> None:
    keys = ["betas", *(f"model_ema.a{i}.weight" for i in range(7)), *(f"x.y.{i}" for i in range(9))]
    assert grouped(keys)[0] == "betas" and grouped(keys)[-1] == "x.y.…  (9 keys)"
    assert [size(n) for n in (12, 3_440_000_000, 5_000_000)] == ["12 bytes", "3.44 GB", "5.00 MB"]


def dora(folder: Path, file: Path) -> LatentDiffusionPipeline:
    """A pipeline with a DoRA of rank 2 on it, which the file holds."""
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(3)
    changes = {}
    for name, layer in layers_of(pipeline.unet).items():
        if name.endswith(("to_q", "conv1")):
            down = torch.randn(2, *layer.weight.shape[1:]) / layer.weight[0].numel() ** 0.5
            up = torch.randn(len(layer.weight), 2, *[1] * (layer.weight.ndim - 2)) * 0.1
            size = layer.weight.detach().flatten(1).norm(dim=1) * 1.3
            changes[f"unet.{name}"] = LowRank(down, up, 2.0, size)
    pipeline.load_lora(write_lora(file, changes, "kohya"))
    return pipeline


def test_loras_are_merged_at_their_weights(folder: Path, tmp_path: Path) -> None:
    pipeline = dora(folder, tmp_path / "dora.safetensors")
    pipeline.unload_lora()
    pipeline.load_lora(tmp_path / "dora.safetensors", 0.7)
    pipeline.fuse_lora()
    for target in ("merged", "merged.safetensors"):
        arguments = [str(folder), str(tmp_path / target), "--lora"]
        assert convert.main([*arguments, f"{tmp_path / 'dora.safetensors'}:0.7"]) == 0
        merged = load_model(tmp_path / target).unet.state_dict()
        for name, weight in pipeline.unet.state_dict().items():
            assert torch.equal(merged[name], weight), name


def test_a_dora_becomes_the_nearest_plain_lora(folder: Path, tmp_path: Path, capsys: Any) -> None:
    pipeline = dora(folder, tmp_path / "dora.safetensors")
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    pipeline.fuse_lora()
    wanted = {k: v - before[k] for k, v in pipeline.unet.state_dict().items()}
    whole = sum(float(d.square().sum()) for d in wanted.values())
    pipeline.unload_lora()
    for rank in (4, 1000):
        file = tmp_path / f"plain-{rank}.safetensors"
        arguments = [str(folder), str(file), "--lora", str(tmp_path / "dora.safetensors")]
        assert convert.main([*arguments, "--rank", str(rank)]) == 0
        said = float(re.search(r"relative error of the change: (\S+)", capsys.readouterr().out)[1])
        assert not any(key.endswith("dora_scale") for key in load_file(file))
        pipeline.load_lora(file)
        pipeline.fuse_lora()
        after = pipeline.unet.state_dict()
        off = sum(float((after[k] - before[k] - d).square().sum()) for k, d in wanted.items())
        assert said == pytest.approx((off / whole) ** 0.5, rel=0.01, abs=1e-5)
        assert said > 0.05 if rank == 4 else said < 1e-5
        pipeline.unload_lora()


def test_what_becomes_no_plain_lora(folder: Path, tmp_path: Path, capsys: Any) -> None:
    plain = write_lora(
        tmp_path / "plain.safetensors",
        {"unet.conv_in": LowRank(torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1), 1.0)},
    )
    out = str(tmp_path / "out.safetensors")
    for arguments, words in (
        ([out, "--lora", str(plain), "--rank", "0"], "at least 1"),
        ([out, "--rank", "4"], "one --lora"),
        ([str(tmp_path / "out"), "--lora", str(plain), "--rank", "4"], "written as .safetensors"),
        ([out, "--lora", str(plain), "--rank", "4"], "is no DoRA, LoHa or LoKr"),
        ([out, "--lora", str(tmp_path / "none"), "--rank", "4"], "no LoRA file"),
        ([out, "--lora", f"{plain}:much"], "FILE:WEIGHT"),
    ):
        assert convert.main([str(folder), *arguments]) == 2
        assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["plain.safetensors"]
