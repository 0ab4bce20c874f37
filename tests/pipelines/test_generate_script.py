"""`latentdiff generate` as a user calls it; inference/generate.py is the same main()."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.random_models import TEXT_WIDTH, make_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def script() -> ModuleType:
    return import_module("latentdiff.cli.generate")


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    if code := script.main():
        sys.exit(code)


def test_one_image(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "cat.png"
    fast = ("--model", model, "--steps", "2", "--seed", "3", "--quiet")
    call(script, monkeypatch, "a cat", "--output", str(output), *fast)
    assert Image.open(output).size == (32, 32)
    assert capsys.readouterr().out.strip() == str(output)


def test_grid_and_numbered_files(
    script: ModuleType, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "g.png"
    fast = ("--model", model, "--steps", "2", "--size", "16x32", "--num-images", "3", "--quiet")
    call(script, monkeypatch, "a cat", "dog", "--output", str(output), *fast)
    assert Image.open(output).size == (3 * 34 - 2, 2 * 18 - 2)
    call(script, monkeypatch, "a cat", "--output", str(output), "--separate", *fast)
    assert sorted(p.name for p in tmp_path.glob("g-*.png")) == [f"g-{k:03d}.png" for k in range(3)]


def test_long_and_weighted_prompts_say_how_they_were_read(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fast = ("--model", model, "--steps", "1", "--quiet", "--output", str(tmp_path / "a.png"))
    call(script, monkeypatch, "a (cat:1.2) BREAK dog", *fast, "--weighted")
    said = capsys.readouterr().err
    assert "'a (cat:1.2) BREAK dog': 3 tokens in 2 chunks (14 fit into one)" in said
    with warnings.catch_warnings():  # of words that are left out
        warnings.filterwarnings("error", "the text encoder takes")
        call(script, monkeypatch, "cat " * 15, *fast, "--long")
    assert "15 tokens in 2 chunks" in capsys.readouterr().err


def test_learned_words_by_file_and_by_name(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from latentdiff.formats.embedding import write_embedding

    file = str(write_embedding(tmp_path / "a=b.safetensors", "<a>", torch.ones(2, TEXT_WIDTH)))
    fast = ("--model", model, "--steps", "1", "--quiet", "--output", str(tmp_path / "a.png"))
    call(script, monkeypatch, "a <a> <b>", *fast, "--embedding", file, "--embedding", f"{file}=<b>")
    said = capsys.readouterr().err
    assert "word: <a>" in said and "word: <b>" in said
    assert "has learned" not in said  # a warning is for unknown words
    with pytest.raises(SystemExit) as end:
        call(script, monkeypatch, "a", *fast, "--embedding", f"{file}=cat")
    assert end.value.code == 2 and "knows already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "cat.pgn"), "--output must be an image file"),
        (("--size", "big"), "--size must be like 64 or 64x128"),
        (("--size", "100000", "--model", "./nothing"), "--size must be at most 16,777,216 pixels"),
        (("--size", "8192x4096"), "got 8192x4096, 33,554,432 pixels"),
        (("--size", "0", "--model", "./nothing"), "--size must be at least 1 in both directions"),
        (("--size", "64x0", "--model", "./nothing"), "got 64x0"),
        (("--size", "9" * 5000), "--size must be like 64 or 64x128"),
        (("--size", "-64"), "--size must be like 64 or 64x128"),
        (("--guidance", ""), "--guidance must be numbers with commas between; got ''"),
        (("--timesteps", ""), "--timesteps must be numbers"),
        (("--sampler", ""), "sampler must be one of"),
        (("--steps", "0"), "num_inference_steps must be a whole number of at least 1; got 0"),
        (("--num-images", "0"), "num_images_per_prompt must be a whole number of at least 1"),
        (("--model", "./nothing"), "this folder does not exist"),
        (("--output", "/proc/x/cat.png", "--model", "./nothing"), "cannot be written"),
        (("--output", "/proc/cat.png", "--model", "./nothing"), "cannot be written"),
        (("--output", "x" * 300 + ".png", "--model", "./nothing"), "cannot be written"),
        (("--output", "cat.psd", "--model", "./nothing"), "cannot be written in PSD"),
        (("--output", "cat.xbm", "--model", "./nothing"), "cannot be written in XBM"),
        (("--output", "cat.h5", "--model", "./nothing"), "cannot be written in HDF5"),
        (("--columns", "0"), "--columns must be at least 1"),
        (("--guidance", "3,x"), "--guidance must be numbers with commas between; got '3,x'"),
        (("--sampler", "dpmpp_2n"), "Did you mean 'dpmpp_2m'"),
        (("--spacing", "karas"), "Did you mean 'karras'"),
        (("--timesteps", "5,6"), "timesteps must decrease strictly"),
        (("--device", "tpu"), "--device tpu cannot be used here"),
    ],
)
def test_mistakes_end_with_one_line(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call(script, monkeypatch, "a cat", *arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ")
    assert message in error and error.count("\n") == 1


def test_unknown_words_and_lora_syntax_are_warned_of_once(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast = ("--model", model, "--steps", "1", "--quiet", "--output", str(tmp_path / "a.png"))
    with pytest.warns(UserWarning) as warned:
        call(script, monkeypatch, "a <dog>", "cat <dog> <lora:fur:0.8>", *fast)
    said = "\n".join(str(one.message) for one in warned)
    assert said.count("holds '<dog>'") == said.count("holds '<lora:fur:0.8>'") == 1
    assert '--embedding "FILE=<dog>"' in said and "--lora fur.safetensors:0.8" in said


def test_help_names_every_sampler(script: ModuleType) -> None:
    from latentdiff.diffusion.samplers import SAMPLERS

    assert set(script.SAMPLER_NAMES) == set(SAMPLERS)


def test_lora_option(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from latentdiff.formats.lora import write_lora
    from latentdiff.models.low_rank import LowRank

    torch.manual_seed(0)
    name = "unet.mid_block.attentions.0.proj_in"
    file = tmp_path / "style.safetensors"
    write_lora(file, {name: LowRank(torch.randn(2, 32), torch.randn(32, 2), 2.0)})
    images = []
    fast = ("a cat", "--model", model, "--steps", "2", "--seed", "3", "--quiet", "--output")
    for lora in ([], [f"{file}"], [f"{file}:0.5"], [f"{file}:0"]):
        options = ["--lora", *lora] if lora else []
        output = tmp_path / f"{len(images)}.png"
        call(script, monkeypatch, *fast, str(output), *options)
        images.append(Image.open(output).tobytes())
    assert images[0] == images[3]
    assert len(set(images)) == 3
    for given, message in (
        (f"{file}:much", "--lora must be FILE or FILE:WEIGHT; got "),
        ("none", "no LoRA file at none"),
    ):
        with pytest.raises(SystemExit) as end:
            call(script, monkeypatch, *fast, str(tmp_path / "x.png"), "--lora", given)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_two_passes_previews_little_memory_and_other_parts(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The images that the pipeline makes of the same options; the preview is the last step's."""
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.task import PipelineOutput

    make_pipeline().vae.save_pretrained(tmp_path / "vae")
    output, preview = tmp_path / "a.png", tmp_path / "so-far.png"
    given = ("--model", model, "--vae", str(tmp_path / "vae"), "--steps", "2", "--seed", "3")
    given += ("--clip-skip", "1", "--hires-scale", "1.5", "--hires-strength", "0.5", "--low-memory")
    given += ("--preview", str(preview), "--output", str(output), "--quiet", "--device", "cpu")
    call(script, monkeypatch, "a cat", *given)
    pipeline = LatentDiffusionPipeline.from_pretrained(model, vae=tmp_path / "vae")
    options = {"clip_skip": 1, "hires_scale": 1.5, "hires_strength": 0.5, "progress": False}
    *steps, result = pipeline.stream("a cat", seed=3, num_inference_steps=2, **options)
    assert isinstance(result, PipelineOutput)
    for file, expected in ((output, result.images[0]), (preview, steps[-1].preview[0])):
        difference = np.asarray(Image.open(file), int) - np.asarray(expected, int)
        assert np.abs(difference).max() <= 1
    again = ("--replay", str(output), "--low-memory", "--quiet", "--output", f"{output}-2.png")
    call(script, monkeypatch, *again)
    assert "the same image, bit for bit" in capsys.readouterr().err
    monkeypatch.setattr(LatentDiffusionPipeline, "load_safety_checker", lambda self, name: setattr(
        self, "safety_checker", lambda images: [name == "bad"] * len(images)))  # fmt: skip
    for name in ("good", "bad"):
        capsys.readouterr()
        call(script, monkeypatch, "a cat", *given, "--safety-checker", name)
        said = "flagged by the safety checker: seed 3" in capsys.readouterr().err
        assert said == (name == "bad")


def test_styles_and_wildcards(
    script: ModuleType,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styles.csv").write_text("name,prompt,negative_prompt\nink,{prompt} ink,dog\n")
    (tmp_path / "w.txt").write_text("cat\n")
    fast = ("--model", model, "--steps", "2", "--seed", "3", "--quiet", "--output")
    call(script, monkeypatch, "a __w__", *fast, "a.png", "--style", "ink", "--wildcards", ".")
    assert "'a cat ink': " in capsys.readouterr().err
    call(script, monkeypatch, "a cat ink", *fast, "b.png", "--negative", "dog")
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    call(script, monkeypatch, "a cat ink", *fast, "c.png")
    assert Image.open("a.png").tobytes() != Image.open("c.png").tobytes()
    with pytest.raises(SystemExit) as end:
        call(script, monkeypatch, "a", *fast, "d.png", "--style", "inc")
    assert end.value.code == 2 and "Did you mean 'ink'?" in capsys.readouterr().err
