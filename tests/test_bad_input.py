"""Every mistake is named before any training starts: no traceback, no file written, exit code 2."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from tiny_training import arguments, make_images, make_parts  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images", count=3)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    from train_latent import main

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.split("error: ", 1)[1]


CASES = {
    "data.path=nowhere/at/all": ["nowhere/at/all", "data.path"],
    "data.caption_column=captoin": ["captoin", "caption", "Did you mean"],
    "optimizer.learning_rte=1": ["optimizer.learning_rte", "unknown key", "lr"],
    "optimizer.weight_decai=1": ["unknown key", "Did you mean 'weight_decay'?"],
    "objective.prediction=eps": ["eps", "zero_terminal_snr", "v, flow or x0"],
    "data.image_size=17": ["data.image_size", "multiple", "17"],
    "data.image_size=18": ["data.image_size", "multiple of 4", "18", "16 or 20"],
    "model.unet.in_channels=9": ["in_channels", "4 latent channels", "9"],
    "model.unet.out_channels=3": ["out_channels", "4 latent channels", "3"],
    "model.unet.cross_attention_dim=40": ["cross_attention_dim", "24", "40"],
    "model.vae=nowhere/vae": ["nowhere/vae"],
    "model.pretrained=nowhere/model/x": ["nowhere/model/x"],
    "validation.steps=1001": ["validation.steps", "1 … 1000", "1001"],
    "loop.batch_size=0": ["loop.batch_size: must be at least 1"],
    "loop.mixed_precision=bf61": ["loop.mixed_precision", "Did you mean 'bf16'?"],
    "data.crop=random": ["data.crop=random", "center or pad"],
}


@pytest.mark.parametrize("override", CASES)
def test_mistakes_in_the_configuration(
    override: str, parts: Path, images: Path, tmp_path: Path, capsys
) -> None:
    if override.startswith("data.caption_column"):
        images = tmp_path / "table"
        make_images(images, 1)
        (images / "metadata.csv").write_text("file_name,caption\n0.png,a square\n")
    given = arguments(parts, images, tmp_path / "run", override)
    if override.startswith("validation"):
        given.append("validation.prompts=[a square]")
    if override.startswith("model.pretrained"):
        given = [a for a in given if not a.startswith("model.unet")]
    error = run(given, capsys)
    for part in CASES[override]:
        assert part in error, error
    assert not (tmp_path / "run").exists()


def test_no_captions(parts: Path, tmp_path: Path, capsys) -> None:
    folder = make_images(tmp_path / "silent", 2)
    for text in folder.glob("*.txt"):
        text.unlink()
    error = run(arguments(parts, folder, tmp_path / "run"), capsys)
    assert "2 images but no captions" in error
    assert "metadata.jsonl" in error


def test_no_usable_images(parts: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"not an image")
    (folder / "a.txt").write_text("a cat")
    error = run(arguments(parts, folder, tmp_path / "run"), capsys)
    assert "0 usable images" in error
    assert "a.png" in error


def test_output_that_cannot_be_written(parts: Path, images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("in the way")
    given = arguments(parts, images, tmp_path / "file" / "run")
    error = run([*given, f"latents.cache_dir={tmp_path / 'cache'}"], capsys)
    assert "cannot be written" in error
    assert "output=" in error


def test_output_that_is_not_empty(parts: Path, images: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    error = run(arguments(parts, images, tmp_path / "run"), capsys)
    assert "not empty" in error
    assert "thesis.txt" in error
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_resume_without_a_checkpoint(parts: Path, images: Path, tmp_path: Path, capsys) -> None:
    error = run([*arguments(parts, images, tmp_path / "run"), "--resume"], capsys)
    assert "--resume" in error
    assert "no complete checkpoint" in error


def test_a_shape_for_a_pretrained_model(parts: Path, images: Path, tmp_path: Path, capsys) -> None:
    given = arguments(parts, images, tmp_path / "run", f"model.pretrained={parts}")
    assert "brings its own U-Net" in run(given, capsys)


def test_processes_that_would_train_alone(
    parts: Path, images: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    # MPI's variables, which Accelerate does not look at on a machine with one process.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    error = run(arguments(parts, images, tmp_path / "run"), capsys)
    assert "2 processes were launched" in error
    assert "--multi_gpu" in error


def test_the_script_prints_no_traceback(tmp_path: Path, capsys, monkeypatch) -> None:
    script = str(ROOT / "training" / "train_latent.py")
    monkeypatch.setattr(sys, "argv", [script, "optimizer.lrr=1", f"output={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Did you mean 'lr'?" in error
