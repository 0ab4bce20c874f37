"""LoRA in train_latent.py: what it writes, and that a resumed run is the same run."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

import killing  # noqa: E402
from launching import launch  # noqa: E402
from random_models import make_pipeline  # noqa: E402
from tiny_training import losses, make_images  # noqa: E402

from latentdiff.formats.lora import read_lora  # noqa: E402

FILES = ("lora/pytorch_lora_weights.safetensors", "lora/lora_kohya.safetensors")
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images, and the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("lora")
    make_pipeline().save_pretrained(folder / "model")
    make_images(folder / "images", 10)
    from train_latent import main

    assert main(given(folder, "straight")) == 0
    return folder


def given(folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"model.pretrained={folder / 'model'}",
        "finetune={kind: lora, rank: 3, alpha: 5, text_encoder: true, fuse: true}",
        "data.kind=folder",
        f"data.path={folder / 'images'}",
        "data.validation_share=0.2",
        f"latents.cache_dir={folder / 'cache'}",
        "objective.condition_dropout=0.3",
        "optimizer.lr=1e-2",
        "optimizer.warmup_steps=2",
        "loop.mixed_precision=no",
        f"loop.max_steps={STEPS}",
        "loop.batch_size=3",
        "loop.gradient_accumulation=2",
        "loop.ema_decay=0.9",
        "loop.checkpoint_every=3",
        "loop.log_every=2",
        "loop.tensorboard=false",
        "validation.every=4",
        "validation.samples=4",
        "validation.steps=2",
        "validation.images=2",
        f"output={folder / name}",
        *more,
    ]


def same_files(one: Path, two: Path) -> None:
    """The same tensors and texts (safetensors writes texts in any order)."""
    for file in FILES:
        ours, theirs = read_lora(one / file), read_lora(two / file)
        assert ours.metadata == theirs.metadata
        assert ours.weights.keys() == theirs.weights.keys()
        for name, change in ours.weights.items():
            other = theirs.weights[name]
            assert torch.equal(change.down, other.down), name
            assert torch.equal(change.up, other.up), name


def same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    same_files(one, two)
    models = [p.relative_to(one) for p in (one / "model").rglob("*.safetensors")]
    assert len(models) == 3
    for path in models:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path


def test_it_writes_both_layouts_and_says_how_to_use_them(folder: Path, capsys) -> None:
    from train_latent import main

    assert main(given(folder, "once", "loop.max_steps=2", "finetune.fuse=false")) == 0
    said = capsys.readouterr()
    assert f'"a cat" --model {folder / "model"} --lora {folder / "once" / FILES[0]}' in said.out
    text = said.out + said.err
    assert "trained: " in text
    assert "peak memory: " in text
    assert not (folder / "once" / "model").exists()
    for file in FILES:
        assert max(float(t.abs().max()) for t in load_file(folder / "once" / file).values()) > 0
    stored = load_file(folder / "once" / "checkpoints" / "step-00000002" / "unet.safetensors")
    assert stored
    assert all(".lora_" in name for name in stored), "the model's own weights are not stored"


def test_it_learns(folder: Path) -> None:
    trained = load_file(folder / "straight" / FILES[0])
    assert any(t.abs().max() > 1e-3 for n, t in trained.items() if ".lora_B." in n)
    assert any(n.startswith("text_encoder.") for n in trained)


def test_a_resumed_run_is_the_same_run(folder: Path, capsys) -> None:
    from train_latent import main

    # A constant learning rate does not depend on the length of the run.
    assert main(given(folder, "resumed", "loop.max_steps=5")) == 0
    assert main([*given(folder, "resumed"), "--resume"]) == 0
    assert losses(folder / "straight") == losses(folder / "resumed")
    same_files(folder / "straight", folder / "resumed")
    again = given(folder, "resumed", "finetune.rank=4")
    assert main([*again, "--resume"]) == 2
    assert "finetune.rank: 3 then, 4 now" in capsys.readouterr().err


def test_another_model_under_the_same_name_is_noticed(folder: Path, capsys) -> None:
    from train_latent import main

    weights = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    try:
        changed = bytearray(kept)
        changed[-1] ^= 1
        weights.write_bytes(changed)
        assert main([*given(folder, "straight"), "--resume"]) == 2
        assert "frozen weights" in capsys.readouterr().err
    finally:
        weights.write_bytes(kept)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("LATENTDIFF_KILLS", "3"))))
def test_killed_anywhere_it_goes_on_bit_for_bit(folder: Path, number: int) -> None:
    from train_latent import main

    from latentdiff.train.output import is_started

    fate = killing.Fate()
    with pytest.MonkeyPatch.context() as patch:
        killing.arm(fate, patch.setattr)
        assert main(given(folder, f"counted-{number}")) == 0
    moment = random.SystemRandom().randrange(len(fate.names) // 4, len(fate.names))
    name = f"killed-{number}-at-{moment}-{fate.names[moment]}".replace(" ", "-")
    assert killing.train(given(folder, name), moment) == -signal.SIGKILL
    resume = ["--resume"] if is_started(folder / name) else []
    assert killing.train([*given(folder, name), *resume]) == 0
    same_run(folder / "straight", folder / name)


@pytest.mark.slow
def test_two_processes_are_one_training(folder: Path) -> None:
    more = ["loop.batch_size=2", "loop.gradient_accumulation=1"]
    run = launch(
        ROOT / "training" / "train_latent.py", given(folder, "two", *more), "ddp_cpu_2.yaml"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    from train_latent import main

    assert main(given(folder, "one", "loop.batch_size=4", "loop.gradient_accumulation=1")) == 0
    ours, theirs = losses(folder / "two"), losses(folder / "one")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[k] - theirs[k]) for k in ours) < 1e-5
    found, expected = (load_file(folder / n / FILES[1]) for n in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_shards_are_refused_before_training(folder: Path) -> None:
    run = launch(
        ROOT / "training" / "train_latent.py", given(folder, "sharded"), "fsdp2_cpu_2.yaml"
    )
    assert run.returncode != 0
    assert "finetune.kind=full or inpainting can be sharded" in run.stderr
