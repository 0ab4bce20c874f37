"""A run that is killed and resumed equals the run that was left alone, bit for bit."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

import killing  # noqa: E402
from tiny_training import arguments, losses, make_images, make_parts  # noqa: E402

SCRIPT = str(ROOT / "training" / "train_latent.py")
STEPS = 24
#: How many random moments are tried; half of them fall within the writing of checkpoints.
KILLS = int(os.environ.get("LATENTDIFF_KILLS", "8"))
# Two captions an image, dropped captions, accumulation, a moving average, a held-out share: all
# that could depend on history.
SETTINGS = [
    f"loop.max_steps={STEPS}",
    "loop.checkpoint_every=5",
    "loop.gradient_accumulation=2",
    "loop.batch_size=3",
    "loop.ema_decay=0.9",
    "loop.log_every=4",
    "power_ema.every=6",
    "objective.condition_dropout=0.3",
    "data.validation_share=0.2",
    "validation.every=7",
    "validation.samples=4",
    "validation.steps=2",
    "validation.images=2",
    "optimizer.decay=cosine",
    "optimizer.warmup_steps=3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts, images and the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("resume")
    make_parts(folder / "parts")
    images = make_images(folder / "images", 10)
    for text in images.glob("*.txt"):
        text.write_text(text.read_text() + "\nanother caption of it\n")
    from train_latent import main

    assert main(given(folder, "straight")) == 0
    return folder


def given(folder: Path, name: str, *more: str) -> list[str]:
    return arguments(folder / "parts", folder / "images", folder / name, *SETTINGS, *more)


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, SCRIPT, *arguments], stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


def same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    assert sorted(losses(one)) == list(range(1, STEPS + 1))
    weights = [p.relative_to(one) for p in one.rglob(f"step-{STEPS:08d}/*.safetensors")]
    weights += [p.relative_to(one) for p in (one / "model").rglob("*.safetensors")]
    assert len(weights) >= 6
    for path in weights:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path


@pytest.mark.parametrize("extend", ["restart", "hold"])
def test_an_extended_run_killed_and_resumed_equals_the_one_left_alone(
    folder: Path, extend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from train_latent import main

    outputs = [f"{extend}-whole", f"{extend}-parts"]
    longer = [f"loop.max_steps={STEPS + 4}", f"optimizer.extend={extend}"]
    for output in outputs:
        shutil.copytree(folder / "straight", folder / output)
    assert main([*given(folder, outputs[0], longer[0]), "--resume"]) == 2
    assert "optimizer.extend=restart" in capsys.readouterr().err
    assert main([*given(folder, outputs[0], *longer), "--resume"]) == 0
    in_parts = [*given(folder, outputs[1], *longer), "loop.max_minutes=1e-9", "--resume"]
    while main(in_parts) == 0 and max(losses(folder / outputs[1])) < STEPS + 4:
        pass
    assert losses(folder / outputs[0]) == losses(folder / outputs[1])
    assert max(losses(folder / outputs[0])) == STEPS + 4


def test_killed_without_warning_at_a_random_moment(folder: Path) -> None:
    process = start(given(folder, "killed"))
    moment = random.SystemRandom().choice([5, 10, 15])
    wait_for(folder / "killed" / "checkpoints" / f"step-{moment:08d}", process)
    time.sleep(random.SystemRandom().random() * 0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    made = losses(folder / "killed")
    assert len(made) < STEPS, "the run was over before it was killed"
    from train_latent import main

    assert main([*given(folder, "killed"), "--resume"]) == 0
    same_run(folder / "straight", folder / "killed")


@pytest.fixture(scope="module")
def events(folder: Path) -> list[str]:
    """What happens in a whole run, by the numbers that `killing` counts."""
    fate = killing.Fate()
    from train_latent import main

    with pytest.MonkeyPatch.context() as patch:
        killing.arm(fate, patch.setattr)
        assert main(given(folder, "counted")) == 0
    same_run(folder / "straight", folder / "counted")
    return fate.names


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_killed_anywhere_it_goes_on_bit_for_bit(
    folder: Path, events: list[str], number: int
) -> None:
    from latentdiff.train.checkpoint import checkpoints
    from latentdiff.train.output import is_started

    training = {"backward", "update", "log"}
    writes = [n for n, name in enumerate(events) if name not in training]
    steps = [n for n, name in enumerate(events) if name in training]
    assert len(writes) > 40
    assert len(steps) > 3 * STEPS
    moment = random.SystemRandom().choice(writes if number % 2 else steps)
    name = f"killed-{number}-at-{moment}-{events[moment]}".replace(" ", "-")
    assert killing.train(given(folder, name), moment) == -signal.SIGKILL
    output = folder / name
    print(f"{name}: {[p.name for p in checkpoints(output / 'checkpoints')]} whole")
    resume = ["--resume"] if is_started(output) else []
    assert killing.train([*given(folder, name), *resume]) == 0
    same_run(folder / "straight", output)
    left = [p.name for p in (output / "checkpoints").iterdir()]
    assert sorted(left) == ["step-00000020", "step-00000024"]


def test_asked_to_stop_it_writes_a_checkpoint_first(folder: Path) -> None:
    from train_latent import main

    # One long interval between checkpoints: what is resumed from is what the signal caused.
    more = ["loop.checkpoint_every=1000"]
    process = start(given(folder, "stopped", *more))
    wait_for(folder / "stopped" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert process.stderr is not None
    assert "--resume" in process.stderr.read()
    assert main([*given(folder, "stopped", *more), "--resume"]) == 0
    same_run(folder / "straight", folder / "stopped")


def test_started_again_by_the_launcher_it_goes_on_by_itself(folder: Path, monkeypatch) -> None:
    from train_latent import main

    assert main(given(folder, "straight")) == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(given(folder, "straight")) == 0
    assert sorted(losses(folder / "straight")) == list(range(1, STEPS + 1))


def test_other_settings_are_refused_by_name(folder: Path, capsys) -> None:
    from train_latent import main

    assert main([*given(folder, "straight", "optimizer.lr=0.5"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: 0.0003 then, 0.5 now" in error
    assert main([*given(folder, "straight", "loop.batch_size=5"), "--resume"]) == 2
    assert "images per step: 6 then, 10 now" in capsys.readouterr().err


def test_a_batch_cut_up_differently_sees_the_same_samples(folder: Path) -> None:
    from train_latent import main

    more = ["loop.batch_size=6", "loop.gradient_accumulation=1"]
    assert main(given(folder, "whole", *more)) == 0
    ours, theirs = losses(folder / "whole"), losses(folder / "straight")
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[k] - theirs[k]) for k in ours) < 1e-5


def test_two_runs_do_not_share_a_folder(folder: Path, capsys) -> None:
    from train_latent import main

    from latentdiff.train.output import open_output

    lock = open_output(folder / "straight")
    try:
        assert main([*given(folder, "straight"), "--resume"]) == 2
        assert "another process is training" in capsys.readouterr().err
    finally:
        lock.close()
    assert os.path.exists(folder / "straight" / ".lock")
