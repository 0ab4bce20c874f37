"""Runs of train_autoencoder.py and train_clip.py: their output folder, checkpoints and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.train.autoencoder import AutoencoderTrainConfig
from latentdiff.train.clip import ClipTrainConfig
from latentdiff.train.config import TrainConfig
from latentdiff.train.optimizer import make_optimizer, named_state
from latentdiff.train.run import Run


def start(folder: Path, resume: bool = False, *more: str) -> Run[ClipTrainConfig]:
    given = [f"output={folder}", "loop.tensorboard=false", "loop.mixed_precision=no", *more]
    run = Run(load_config(ClipTrainConfig, None, given), resume)
    run.open_output()
    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.max_steps=0", "loop.max_steps: must be at least 1; got 0."),
        ("loop.batch_size=0", "loop.batch_size: must be at least 1; got 0."),
        ("loop.log_every=0", "loop.log_every: must be at least 1; got 0."),
        ("loop.checkpoint_every=-1", "loop.checkpoint_every: must be at least 1; got -1."),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps: must be at least 0; got -1."),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay: must be at least 0; got -1"),
        ("optimizer.lr=0", "optimizer.lr: must be above 0; got 0"),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm: must be at least 0; got -1"),
        ("loss.kl=-1", "loss.kl: must be at least 0; got -1"),
        ("loss.perceptual_stages=6", "loss.perceptual_stages: must be at most 5; got 6."),
        ("loss.late_start=2", "loss.late_start: must be at most 1; got 2"),
        (
            "autoencoder.latent_channels=0",
            "autoencoder.latent_channels: must be at least 1; got 0.",
        ),
        ("autoencoder.block_out_channels=[30]", "must be multiples of norm_num_groups=8"),
        ("autoencoder.block_out_channels=[]", "must be multiples of norm_num_groups=8"),
        ("clip.text_heads=0", "clip.text_heads: must be at least 1; got 0."),
        ("clip.image_heads=3", "image_width must be a multiple of image_heads=3; got 128."),
        ("clip.max_tokens=2", "clip.max_tokens: must be at least 3; got 2."),
        # With one pair there is nothing to tell it from: the loss is 0.
        ("loop.batch_size=1", "loop.batch_size must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(override: str, message: str) -> None:
    clip = override.startswith("clip") or override == "loop.batch_size=1"
    with pytest.raises(UserError) as error:
        load_config(ClipTrainConfig if clip else AutoencoderTrainConfig, None, [override])
    assert "1 problem in" in str(error.value) and message in str(error.value)


def test_a_new_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    start(tmp_path / "new").end()
    assert [p.name for p in (tmp_path / "new").rglob("*") if p.is_file()] == [".lock"]
    start(tmp_path / "new").end()


@pytest.mark.parametrize(
    ("files", "resume", "words"),
    [
        (["config.yaml", "metrics.jsonl"], False, r"not empty .* another output=FOLDER"),
        (["image.png"], False, r"not empty \(it holds image.png\)"),
        ([], True, "no complete checkpoint"),
        (["image.png"], True, "no complete checkpoint"),
        (["state.pt", "metrics.jsonl"], True, "state.pt is a checkpoint of an earlier version"),
        (["state.pt", "metrics.jsonl"], False, "not empty"),
    ],
)
def test_refused(tmp_path: Path, files: list[str], resume: bool, words: str) -> None:
    for name in files:
        (tmp_path / name).write_text(name)
    with pytest.raises(UserError, match=words) as refused:
        start(tmp_path, resume)
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def step_once(
    run: Run[ClipTrainConfig], *names: str
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Open a run's log with models of the given names; train each for one step."""
    torch.manual_seed(len(names) + run.resumes)
    models: dict[str, nn.Module] = {name: nn.Linear(3, 2) for name in names}
    optimizers = {
        name: make_optimizer(model, run.config.optimizer) for name, model in models.items()
    }
    run.load_state(models, optimizers, {"models": ", ".join(models)})
    run.open_log()
    for name, model in models.items() if not run.resumes else ():
        step = run.optimizer_step(model, run.accelerator.prepare(optimizers[name]))
        step.backward(model(torch.ones(1, 3)).square().sum())
        step.update(0)
    return models, optimizers


@pytest.mark.parametrize("now", [("clip",), ("clip", "teacher"), ("clip", "head")])
def test_a_checkpoint_of_several_models_is_read_back_into_the_same_ones(
    tmp_path: Path, now: tuple[str, ...]
) -> None:
    first = start(tmp_path)
    models, optimizers = step_once(first, "clip", "head")
    first.state.save(3, 7.5)
    first.end()
    again = start(tmp_path, True)
    if now != ("clip", "head"):
        with pytest.raises(UserError, match=rf"models: 'clip, head' then, '{', '.join(now)}' now"):
            step_once(again, *now)
        again.end()
        return
    read, others = step_once(again, *now)
    again.end()
    assert (again.first_step, again.seconds) == (3, 7.5)
    for name in now:
        for key, value in models[name].state_dict().items():
            assert torch.equal(read[name].state_dict()[key], value)
        wanted = named_state(optimizers[name], models[name])
        found = named_state(others[name], read[name])
        assert wanted.keys() == found.keys() and len(wanted) == 6
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("config", [AutoencoderTrainConfig, ClipTrainConfig, TrainConfig])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("stage.learning_rate=1e-3", r"stage.learning_rate: is called optimizer.lr now"),
        ("stage.output=a", "stage.output: is called output now"),
        ("stage.batch_size=8", "is called loop.batch_size .* of one process"),
    ],
)
def test_options_of_before_name_those_of_today(config: type, given: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(config, None, [given])


def test_every_option_of_today_is_one_of_those_that_the_old_section_points_to() -> None:
    for new in AutoencoderTrainConfig.renamed["stage"].values():
        value: Any = AutoencoderTrainConfig()
        for part in new.split(" ")[0].split("."):
            value = getattr(value, part)


def test_a_step_of_contrastive_loss_is_not_cut_up(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    script = Path(__file__).parents[2] / "training" / "train_clip.py"
    given = [f"output={tmp_path}", "data.kind=folder", f"data.path={image_folder}"]
    given.append("loop.mixed_precision=no")
    main = runpy.run_path(str(script))["main"]
    assert main([*given, "loop.batch_size=4", "loop.gradient_accumulation=2"]) == 2
    assert "Set loop.batch_size=8 and loop.gradient_accumulation=1" in capsys.readouterr().err
