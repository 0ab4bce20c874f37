"""Output folders of the training stages: what is there is never lost, and said before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn, optim

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.train.autoencoder import AutoencoderTrainConfig
from latentdiff.train.clip import ClipTrainConfig
from latentdiff.train.stage import STATE_FILE, Stage, StageConfig, check_stage_output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.max_steps=0", "stage: max_steps must be at least 1; got 0."),
        ("stage.batch_size=0", "stage: batch_size must be at least 1; got 0."),
        ("stage.log_every=0", "stage: log_every must be at least 1; got 0."),
        ("stage.checkpoint_every=-1", "stage: checkpoint_every must be at least 1; got -1."),
        ("stage.warmup_steps=-1", "stage: warmup_steps must be at least 0; got -1."),
        ("stage.weight_decay=-1", "stage: weight_decay must be at least 0; got -1"),
        ("stage.learning_rate=0", "stage: learning_rate must be above 0; got 0"),
        ("stage.clip_norm=-1", "stage: clip_norm must be above 0; got -1"),
        ("loss.kl=-1", "loss: kl must be at least 0; got -1"),
        ("loss.perceptual_stages=6", "loss: perceptual_stages must lie in 1 … 5; got 6."),
        ("loss.late_start=2", "loss: late_start must lie in 0 … 1; got 2"),
        ("autoencoder.latent_channels=0", "latent_channels must be at least 1; got 0."),
        ("autoencoder.block_out_channels=[30]", "must be multiples of norm_num_groups=8"),
        ("autoencoder.block_out_channels=[]", "must be multiples of norm_num_groups=8"),
        ("clip.text_heads=0", "clip: text_heads must be at least 1; got 0."),
        ("clip.image_heads=3", "image_width must be a multiple of image_heads=3; got 128."),
        ("clip.max_tokens=2", "clip: max_tokens must be at least 3; got 2."),
        # With one pair there is nothing to tell it from: the loss is 0.
        ("stage.batch_size=1", "stage.batch_size must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, message: str) -> None:
    clip = override.startswith("clip") or override == "stage.batch_size=1"
    with pytest.raises(UserError) as error:
        load_config(ClipTrainConfig if clip else AutoencoderTrainConfig, None, [override])
    assert "1 problem in" in str(error.value) and message in str(error.value)


def test_a_new_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_stage_output(StageConfig(output=str(tmp_path / "new")), resume=False)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "resume", "words"),
    [
        ([STATE_FILE, "metrics.jsonl"], False, "Add --resume"),
        (["picture.png"], False, r"not empty \(it holds picture.png\)"),
        ([], True, "no checkpoint"),
        (["picture.png"], True, "no checkpoint"),
    ],
)
def test_refused(tmp_path: Path, files: list[str], resume: bool, words: str) -> None:
    for name in files:
        (tmp_path / name).write_text(name)
    with pytest.raises(UserError, match=words):
        check_stage_output(StageConfig(output=str(tmp_path)), resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_going_on_is_allowed_where_a_checkpoint_is(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text("weights")
    check_stage_output(StageConfig(output=str(tmp_path)), resume=True)
    assert (tmp_path / STATE_FILE).read_text() == "weights"


def make_stage(folder: Path, *names: str) -> Stage:
    modules = {name: nn.Linear(2, 2) for name in names}
    optimizers = {name: optim.SGD(module.parameters()) for name, module in modules.items()}
    return Stage(modules, optimizers, StageConfig(output=str(folder)), Accelerator(cpu=True))


@pytest.mark.parametrize("now", [("clip",), ("clip", "teacher"), ("clip", "head")])
def test_only_a_checkpoint_of_the_same_modules_is_resumed(
    tmp_path: Path, now: tuple[str, ...]
) -> None:
    make_stage(tmp_path, "clip", "head").save(3)
    if now == ("clip", "head"):
        assert make_stage(tmp_path, *now).resume(True) == 3
        return
    with pytest.raises(UserError, match=f"has clip, head; this run trains {', '.join(now)}"):
        make_stage(tmp_path, *now).resume(True)
