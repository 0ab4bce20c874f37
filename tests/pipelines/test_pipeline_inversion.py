"""invert() as a pipeline method and inference/invert.py as a user calls it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffusionPipeline
from latentdiff.errors import UserError
from latentdiff.images import psnr
from tests.random_models import make_pipeline

SCRIPT = Path(__file__).parents[2] / "inference" / "invert.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> LatentDiffusionPipeline:
    """A random network for the most part replaced by the exact one of N(0, ½² I).

    By itself it is no denoiser of anything, and no iteration that relies on one comes to rest.
    """
    pipeline = LatentDiffusionPipeline.from_pretrained(folder)
    random = pipeline.unet.forward

    def forward(x_t: torch.Tensor, t: torch.Tensor, kv: Any) -> torch.Tensor:
        alpha, sigma = (
            level.float()[:, None, None, None]
            for level in (pipeline.schedule.alpha(t), pipeline.schedule.sigma(t))
        )
        return sigma / (alpha**2 / 4 + sigma**2) * x_t + 0.05 * random(x_t, t, kv=kv)

    pipeline.unet.forward = forward  # type: ignore[method-assign]
    return pipeline


def sample_image(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_the_noise_leads_back_to_the_latents(pipeline: LatentDiffusionPipeline) -> None:
    given = [sample_image(0), sample_image(1, (50, 40))]
    call: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 1.0}
    found = pipeline.invert(given, ["a cat", "dog"], iterations=20, **call)
    again = pipeline(
        ["a cat", "dog"],
        latents=found.latents,
        sampler="ddim",
        output_type="latent",
        progress=False,
        **call,
    ).images
    start = (found.latents - found.image_latents).abs().mean()
    error = (again - found.image_latents).abs().mean()
    print(f"noise and latents differ by {start:.3f}, latents after the round trip by {error:.1e}")
    assert error < 0.02 * start


def test_images_are_alone_and_together_the_same(pipeline: LatentDiffusionPipeline) -> None:
    given = [sample_image(k) for k in range(3)]
    together = pipeline.invert(given, "a cat", num_inference_steps=3)
    chunks = pipeline.invert(given, "a cat", num_inference_steps=3, batch_size=2)
    torch.testing.assert_close(chunks.latents, together.latents, rtol=0, atol=1e-4)
    pixels = torch.stack([torch.from_numpy(np.array(p)) for p in given]).permute(0, 3, 1, 2) / 255
    tensors = pipeline.invert(pixels, "a cat", num_inference_steps=3)
    torch.testing.assert_close(tensors.latents, together.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": "cat.png"}, "cat.png: the file does not exist"),
        ({"image": []}, "image must be an image file, a PIL image"),
        ({"image": torch.zeros(3, 32, 32)}, r"\(images, 3, 32, 32\)"),
        ({"prompt": ["a", "b"]}, "one for each of the 1 images; got 2"),
        ({"height": 33}, "multiples of 2"),
        ({"height": 0}, "multiples of 2"),
        ({"width": 32.0}, "must be whole numbers"),
        ({"timestep_spacing": ""}, "timestep_spacing must be one of"),
        ({"height": 100_000, "width": 100_000}, "at most 16,777,216 pixels"),
        ({"iterations": 0}, "iterations must be a whole number"),
        ({"num_inference_steps": 1001}, "1 … 1000"),
        ({"guidance_scale": -1}, "guidance_scale"),
    ],
)
def test_bad_input(
    pipeline: LatentDiffusionPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.invert(**{"image": sample_image(), **arguments})


def test_psnr_has_its_closed_form() -> None:
    reference = torch.full((2, 3, 4, 4), 0.5)
    off = reference + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(off, reference), torch.tensor([20.0, 40.0]), rtol=1e-4, atol=0)


def script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location("invert", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["invert.py", *arguments])
    if code := module.main():
        sys.exit(code)


def test_the_script_writes_a_row_and_the_noise(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file

    sample_image().save(tmp_path / "in.png")
    output, noise = tmp_path / "new" / "row.png", tmp_path / "x_T.safetensors"
    script(
        monkeypatch,
        *(str(tmp_path / "in.png"), "--prompt", "a cat", "--edit", "dog", "--edit", "pain"),
        *("--model", str(folder), "--steps", "3", "--output", str(output), "--noise", str(noise)),
    )
    assert Image.open(output).size == (5 * 34 - 2, 32)
    assert load_file(noise)["latents"].shape == (1, 4, 16, 16)
    assert re.search(r"own image: \d+\.\d dB", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.png",), "nothing.png"),
        (("in.png", "--model", "./no"), "does not exist"),
        (("in.png", "--model", "./no", "--output", "a.psd"), "cannot be written in PSD"),
        (("in.png", "--model", "./no", "--output", "/proc/a.png"), "--output: /proc/a.png cannot"),
        (("in.png", "--model", "./no", "--noise", "/proc/a"), "--noise: /proc/a cannot"),
        (("in.png", "--model", "./no", "--device", "abacus"), "--device abacus cannot be used"),
    ],
)
def test_mistakes_end_with_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sample_image().save("in.png")
    with pytest.raises(SystemExit) as end:
        script(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_embedded_models_round_trip_reaches_25_db(tmp_path: Path) -> None:
    command = Path(__file__).parents[2] / "benchmarks" / "inversion.py"
    output = tmp_path / "figures.json"
    result = subprocess.run(
        [sys.executable, str(command), "--images", "2", "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(output.read_text())
    print(figures)
    assert figures["steps"] == 50 and figures["least PSNR, dB"] > 25
