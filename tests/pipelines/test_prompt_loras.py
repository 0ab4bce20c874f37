"""`<lora:name:0.7>` in a prompt: the image that `load_lora` gives, and no other image changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.cli.generate import main
from latentdiff.errors import UserError
from latentdiff.formats.lora import write_lora
from latentdiff.images import grid
from latentdiff.models.low_rank import LowRank
from latentdiff.pipelines.generate import LatentDiffusionPipeline
from latentdiff.pipelines.metadata import of_grid, read, write
from latentdiff.pipelines.prompt_loras import LoraFolder
from latentdiff.pipelines.replay import Replay
from tests.random_models import TEXT_WIDTH, make_pipeline

FAST: dict[str, Any] = {"num_inference_steps": 2, "progress": False, "seed": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fur.safetensors for the U-Net, sub/word.safetensors for the text encoder too."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("loras")
    (folder / "sub").mkdir()
    unet = "unet.mid_block.attentions.0.proj_in"
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    change = LowRank(torch.randn(2, 32), torch.randn(32, 2), 2.0)
    write_lora(folder / "fur.safetensors", {unet: change})
    own = LowRank(torch.randn(2, TEXT_WIDTH), torch.randn(TEXT_WIDTH, 2), 2.0)
    write_lora(folder / "sub" / "word.safetensors", {unet: change, text: own})
    return folder


@pytest.fixture
def pipeline(model: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(model)


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_an_image_is_as_load_lora_makes_it_and_others_are_as_before(
    syntax: Any, pipeline: LatentDiffusionPipeline, folder: Path
) -> None:
    files = {"fur": folder / "fur.safetensors", "word": folder / "sub" / "word.safetensors"}
    wanted = [[], [("fur", 0.7)], [("word", 1.0)], [("fur", -0.5), ("word", 0.2)], []]
    tags = ["", "<lora:fur:0.7>", "<lora:sub/word>", "<lora:fur:-.5><lyco:word:0.2>", ""]
    options = {**FAST, "prompt_syntax": syntax, "output_type": "pt"}
    prompts = [f"a cat {tag}" for tag in tags]
    found = pipeline(prompts, lora_dir=folder, **options)
    assert pipeline.loras.names == {}
    assert [read.text.strip() for read in found.prompts] == ["a cat"] * 5
    alone = []
    for k, loras in enumerate(wanted):
        for name, weight in loras:
            pipeline.load_lora(files[name], weight)
        options["seed"] = 3 + k
        alone.append(pipeline("a cat", **options))
        assert found.settings[k]["loras"] == alone[-1].settings[0]["loras"]
        pipeline.unload_lora()
        # Of other batches kernels round otherwise; alone it is the same to the bit.
        assert (found.images[k] - alone[-1].images[0]).abs().max() <= 1 / 255
        tagged = pipeline(prompts[k], lora_dir=folder, **options).images
        assert torch.equal(tagged, alone[-1].images)
    options["seed"] = 4
    plain = pipeline("a cat", **options).images[0]
    assert (plain - found.images[1]).abs().max() > 4 / 255


def test_beside_files_that_are_loaded_for_all(
    pipeline: LatentDiffusionPipeline, folder: Path
) -> None:
    options = {**FAST, "output_type": "pt"}
    pipeline.load_lora(folder / "fur.safetensors", 0.3)
    before = pipeline("a cat", **options).images
    tagged = pipeline("a cat <lora:fur:0.4>", lora_dir=folder, **options)
    assert pipeline.loras.names == {"fur": 0.3}
    assert torch.equal(pipeline("a cat", **options).images, before)
    pipeline.unload_lora()
    pipeline.load_lora(folder / "fur.safetensors", 0.7)
    torch.testing.assert_close(
        tagged.images, pipeline("a cat", **options).images, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a <lora:fru:1>", r"<lora:fru:1>: there is no fru.safetensors in .* Did you mean 'fur'\?"),
        ("a <lora:../x:1>", r"there is no \.\./x.safetensors"),
        ("a <lora:fur:much>", "<lora:fur:much>: a LoRA has one weight, such as 0.7; got 'much'"),
        ("a <lora:fur:1:te=0>", "one weight"),
        ("a <lora:fur:nan>", "the weight of a LoRA must be a finite number"),
        ("a <hypernet:fur:1>", "hypernetworks are not supported"),
        ("a <lora:twice:1>", "has several: one/twice.safetensors, two/twice.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    prompt: str, message: str, pipeline: LatentDiffusionPipeline, folder: Path
) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "twice.safetensors").touch()
    with pytest.raises(UserError, match=message):
        pipeline(["a", prompt], lora_dir=folder, **FAST)
    assert pipeline.loras.names == {}


def test_without_a_folder_a_tag_is_no_lora(pipeline: LatentDiffusionPipeline, folder: Path) -> None:
    with pytest.raises(UserError, match="lora"):
        pipeline("a <lora:fur:1>", prompt_syntax="a1111", **FAST)
    with pytest.warns(UserWarning, match="here it loads nothing"):
        pipeline("a <lora:fur:1>", **FAST)
    with pytest.raises(UserError, match="lora_dir must be a folder"):
        LoraFolder(folder / "fur.safetensors")


def test_frames_between_prompts_have_the_same_files(
    pipeline: LatentDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    options = {**FAST, "lora_dir": folder}
    with pytest.raises(UserError, match="must ask for the same LoRA files"):
        pipeline.interpolate(["a cat <lora:fur:1>", "a cat"], 3, **options)
    frames = pipeline.interpolate(["a cat <lora:fur:1>", "dog <lora:fur:1>"], 3, **options)
    file = frames.save(tmp_path / "a.png")[2]
    pipeline.load_lora(folder / "fur.safetensors")
    replay = Replay.of(file)
    again = replay.run(pipeline, {}, progress=False)
    assert replay.verdict(again, {}) == f"{file}: the same image, bit for bit"


def test_a_grid_of_different_files_is_not_made_again(
    pipeline: LatentDiffusionPipeline, folder: Path, tmp_path: Path
) -> None:
    for tag, same in (("<lora:fur:1>", True), ("<lora:fur:0.5>", False), ("", False)):
        found = pipeline(["a cat <lora:fur:1>", f"dog {tag}"], lora_dir=folder, **FAST)
        file = write(grid(found.images), tmp_path / "a.png", of_grid(found.settings, 2))
        if same:
            assert Replay.of(file).settings["loras"] == found.settings[1]["loras"]
        else:
            with pytest.raises(UserError, match="its images had different LoRA files"):
                Replay.of(file)


def test_from_the_shell_and_in_bulk(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--model", str(model), "--steps", "2", "--seed", "3", "--quiet"]
    lora, dir_ = str(folder / "fur.safetensors"), ["--lora-dir", str(folder)]
    files = [tmp_path / f"{k}.png" for k in range(3)]
    assert main(["a cat", *fast, "--lora", f"{lora}:0.7", "--output", str(files[0])]) == 0
    assert main(["a cat <lora:fur:0.7>", *fast, *dir_, "--output", str(files[1])]) == 0
    assert main(["--replay", str(files[1]), "--output", str(files[2]), "--quiet"]) == 0
    assert "bit for bit" in capsys.readouterr().err
    hashes = {read(file).settings["pixels"] for file in files}
    assert len(hashes) == 1
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat <lora:fur:0.7>\na cat\n")
    bulk = ["--prompts", str(prompts), *fast, *dir_, "--output", str(tmp_path / "o.png")]
    assert main(bulk) == main(bulk) == 0
    assert "0 images made, 2 were there" in capsys.readouterr().out
    assert [read(tmp_path / f"o-0000{k}.png").settings["loras"] for k in (0, 1)] == [
        read(files[0]).settings["loras"],
        [],
    ]
    prompts.write_text("a cat\na <lora:none:1>\na <lora:one/twice>\n")
    assert main(bulk) == 2
    error = capsys.readouterr().err
    assert "line 2: <lora:none:1>: there is no none.safetensors" in error
