"""`latentdiff WORD` from a checkout, and from a wheel in an empty folder."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.__main__ import COMMANDS
from tests.tiny_training import make_images

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("training/train_latent.py", "train"),
        ("inference/generate.py", "generate"),
        ("inference/evaluate.py", "evaluate"),
    ],
)
def test_a_script_and_its_command_are_the_same_program(script: str, word: str) -> None:
    module = import_module(COMMANDS[word][0])
    assert runpy.run_path(str(ROOT / script))["main"] is module.main


def test_training_does_not_spin_where_nobody_chose_how_to_wait() -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    code = (
        "import os, sys; sys.modules['torch'] = None\n"  # chosen before torch is imported
        "try: import latentdiff.train.__main__\n"
        f"except ImportError: print(*map(os.environ.get, {names}))"
    )
    for given, expected in (({}, "PASSIVE 0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        own = {k: v for k, v in os.environ.items() if k not in names}
        done = subprocess.run(
            [sys.executable, "-c", code], env=own | given, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.slow
def test_the_readmes_uses_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    source, empty, venv = tmp_path / "source", tmp_path / "empty", tmp_path / "venv"
    source.mkdir(), empty.mkdir()
    shutil.copytree(ROOT / "latentdiff", source / "latentdiff")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"ACCELERATE_USE_CPU": "true", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str | Path) -> str:
        done = subprocess.run(
            words, cwd=empty, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    wheel = ("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    run(sys.executable, "-m", "pip", *wheel)
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (wheel_file,) = tmp_path.glob("*.whl")
    target = ("--python", python, "install", "--no-deps", wheel_file)
    run(sys.executable, "-m", "pip", *target)
    (Path(site) / "others.pth").write_text(sysconfig.get_path("purelib"))
    latentdiff = venv / "bin" / "latentdiff"
    assert run(python, "-c", "import latentdiff; print(latentdiff.__file__)").startswith(site)

    assert run(latentdiff, "generate", "a cat painting").strip() == "image.png"
    assert Image.open(empty / "image.png").size == (64, 64)
    make_images(empty / "my_images", size=64)
    short = ("data.path=my_images", "loop.max_steps=2", "loop.batch_size=2", "validation.every=0")
    launch = (python, "-m", "accelerate.commands.launch", "--num_processes", "1")
    run(*launch, "-m", "latentdiff.train", *short, "output=runs/mine")
    fast = ("--steps", "2", "--quiet")
    run(latentdiff, "generate", "a red square", "--model", "runs/mine/model", *fast, "-o", "b.png")
    adapt = ("finetune.kind=lora", "model.pretrained=runs/mine/model", "output=runs/style")
    said = run(latentdiff, "train", *adapt, *short)
    lora = "runs/style/lora/pytorch_lora_weights.safetensors"
    assert lora in said
    use = ("--model", "runs/mine/model", "--lora", lora, *fast, "-o", "c.png")
    run(latentdiff, "generate", "a red square", *use)
    assert Image.open(empty / "b.png").size == Image.open(empty / "c.png").size == (64, 64)
