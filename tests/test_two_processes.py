"""Two data-parallel processes are one training."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from launching import launch  # noqa: E402
from tiny_training import arguments, losses, make_images, make_parts  # noqa: E402

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "training" / "train_latent.py"
MORE = ["loop.max_steps=12", "loop.gradient_accumulation=2", "data.validation_share=0.2"]
MORE += [
    "validation.every=6",
    "validation.samples=4",
    "validation.steps=2",
    "validation.images=2",
]


def test_two_ranks_give_the_losses_of_one_process(tmp_path: Path) -> None:
    parts, images = make_parts(tmp_path / "parts"), make_images(tmp_path / "images", 10)
    alone, together = tmp_path / "alone", tmp_path / "together"
    from train_latent import main

    assert main([*arguments(parts, images, alone, *MORE), "loop.batch_size=4"]) == 0
    given = [*arguments(parts, images, together, *MORE), "loop.batch_size=2"]
    run = launch(SCRIPT, given, "ddp_cpu_2.yaml")
    assert run.returncode == 0, run.stderr[-3000:]
    manifest = json.loads((together / "checkpoints/step-00000012/manifest.json").read_text())
    assert manifest["processes"] == 2
    assert manifest["facts"]["images per step"] == 8
    ours, theirs = losses(together), losses(alone)
    assert ours.keys() == theirs.keys() == set(range(1, 13))
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 1e-5
    assert (together / "model" / "model_index.json").is_file()
    assert run.stdout.count("use it:") == 1


def test_one_process_through_the_launcher(tmp_path: Path) -> None:
    parts, images = make_parts(tmp_path / "parts"), make_images(tmp_path / "images", 3)
    given = arguments(parts, images, tmp_path / "run", "loop.max_steps=2")
    run = launch(SCRIPT, given, "single.yaml")
    assert run.returncode == 0, run.stderr[-3000:]
    manifest = tmp_path / "run/checkpoints/step-00000002/manifest.json"
    assert json.loads(manifest.read_text())["processes"] == 1
