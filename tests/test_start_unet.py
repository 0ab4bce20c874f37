"""start_unet.py, then train_latent.py with `reading`: the commands of the embedded recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ["data.emoji_concepts=[cat, owl, octopus, red apple, castle, rocket]"]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "training" / script), *arguments, *DATA]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("start") / "run"
    done = run("start_unet.py", f"output={output}", "captions=64", "text=null")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("which a text has is read in") == 2
    return output


def test_the_start_is_a_model_that_diffusers_opens(started: Path) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(started / "model", subfolder="unet")
    assert unet.config.block_out_channels == [72, 96, 192]
    CLIPTextModel.from_pretrained(started / "model", subfolder="text_encoder")


def test_it_is_trained_with_reading(started: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(
        "train_latent.py", "--config", str(ROOT / "training/configs/embedded.yaml"),
        f"output={output}", f"model.pretrained={started / 'model'}", "loop.max_steps=3",
        "loop.batch_size=4", "loop.log_every=1", "validation.pictures=0", "validation.prompts=[]",
        f"latents.cache_dir={tmp_path / 'cache'}", "data.emoji_variants=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "grad_norm" in row] == [1, 2, 3]
    assert (output / "model" / "unet").is_dir()


def test_another_unet_is_refused_before_any_work(started: Path, tmp_path: Path) -> None:
    done = run(
        "train_latent.py", f"output={tmp_path / 'run'}", f"model.pretrained={started / 'model'}",
        "reading.weight=0.1", "reading.attentions=[up_blocks.1.attentions.0]",
    )  # fmt: skip
    assert done.returncode == 2
    assert "up_blocks.1.attentions.0 is no spatial transformer" in done.stderr
    assert not (tmp_path / "run").exists()
