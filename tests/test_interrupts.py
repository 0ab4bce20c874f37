"""Ctrl-C at any place of any script or command: one line, exit code 130, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from interrupting import Script, console, evaluate, run  # noqa: E402
from PIL import Image  # noqa: E402
from random_models import make_pipeline  # noqa: E402
from tiny_training import arguments, make_images, make_parts  # noqa: E402

#: Where in a command Ctrl-C comes, as shares of all calls of Python functions that it makes.
MOMENTS = (0.0, 0.5, 0.95, 0.99, 0.999)
DONE = 128 + signal.SIGINT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, in a folder and in a file, parts, images, and a run with averages."""
    folder = tmp_path_factory.mktemp("interrupts")
    make_pipeline().save_pretrained(folder / "model")
    make_parts(folder / "parts")
    make_images(folder / "images", 8)
    given = ["convert", f"{folder}/model", f"{folder}/model.safetensors"]
    assert run(console, given, folder / "log") == 0
    train = [*latent(folder, folder / "run"), "power_ema.every=2"]
    assert run(Script("train_latent"), train, folder / "log") == 0
    return folder


def latent(at: Path, output: Path) -> list[str]:
    more = ["loop.max_steps=3", "data.validation_share=0.3", "validation.samples=2"]
    more += ["validation.at_start=true", "validation.images=1", "validation.steps=1"]
    more += [f"latents.cache_dir={output.parent / 'cache'}", "loop.checkpoint_every=1"]
    return arguments(at / "parts", at / "images", output, *more)


def small(at: Path, output: Path) -> list[str]:
    return [
        "data.kind=folder", f"data.path={at / 'images'}", "data.image_size=16",
        "loop.mixed_precision=no", "loop.batch_size=4", "loop.max_steps=3",
        "loop.checkpoint_every=1", "loop.tensorboard=false", f"output={output}",
    ]  # fmt: skip


AUTOENCODER = ["autoencoder.block_out_channels=[8,16]", "autoencoder.norm_num_groups=4"]
CLIP = ["clip.text_width=32", "clip.text_layers=1", "clip.image_width=32", "clip.image_layers=1"]
CLIP += ["clip.vocabulary=600"]

#: Name → (main(), arguments for (given files, folder to write to)).
COMMANDS: dict[str, tuple[Any, Callable[[Path, Path], list[str]]]] = {
    "generate": (Script("generate"), lambda at, to: [
        "a cat", "a dog", "--model", f"{at}/model", "--steps", "2", "--separate",
        "--output", f"{to}/a.png",
    ]),
    "invert": (Script("invert"), lambda at, to: [
        f"{at}/images/0.png", "--model", f"{at}/model", "--steps", "2",
        "--output", f"{to}/a.png", "--noise", f"{to}/noise.safetensors",
    ]),
    "evaluate": (evaluate, lambda at, to: ["--output", f"{to}"]),
    "inspect": (console, lambda at, to: ["inspect", f"{at}/model.safetensors"]),
    "convert to a folder": (console, lambda at, to: [
        "convert", f"{at}/model.safetensors", f"{to}/model", "--overwrite",
    ]),
    "convert to a file": (console, lambda at, to: [
        "convert", f"{at}/model", f"{to}/m.safetensors", "--overwrite",
    ]),
    "doctor": (console, lambda at, to: [
        "doctor", f"{at}/images", "--output", f"{to}/report", "--threads", "1",
    ]),
    "cache_latents": (Script("cache_latents"), lambda at, to: latent(at, to / "run")),
    "reconstruct_ema": (Script("reconstruct_ema"), lambda at, to: [
        f"{at}/run", "--sigma-rel", "0.1", "--output", f"{to}/model",
    ]),
    "train_latent": (Script("train_latent"), lambda at, to: [
        *latent(at, to / "run"), *["--resume"] * (to / "run" / "config.yaml").exists(),
    ]),
    "train_autoencoder": (Script("train_autoencoder"), lambda at, to: [
        *small(at, to / "run"), *AUTOENCODER, *["--resume"] * (to / "run" / "config.yaml").exists(),
    ]),
    "train_clip": (Script("train_clip"), lambda at, to: [
        *small(at, to / "run"), *CLIP, *["--resume"] * (to / "run" / "config.yaml").exists(),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_anywhere(name: str, folder: Path, tmp_path: Path) -> None:
    main, words = COMMANDS[name]
    log = tmp_path / "log"
    assert run(main, words(folder, tmp_path / "whole"), log) == 0, log.read_text()
    calls = int(log.with_suffix(".calls").read_text())
    for number, moment in enumerate(MOMENTS):
        output = tmp_path / str(number)
        output.mkdir()
        code = run(main, words(folder, output), log, int(moment * calls))
        error = log.read_text()
        assert code == DONE, (moment, error)
        assert error.count("stopped by ") == 1 and "Traceback" not in error, (moment, error)
        assert error.endswith(".\n") and "stopped by " in error.splitlines()[-1]
        check_whole(output)
        if can_run_again(name, output):
            assert run(main, words(folder, output), log) == 0, (moment, log.read_text())
            check_whole(output)


def can_run_again(name: str, output: Path) -> bool:
    """Whether a command finds what it goes on from, or nothing in its way."""
    if name == "doctor":
        return not any(output.glob("report/*"))
    started = (output / "run" / "config.yaml").exists()
    return not name.startswith("train_") or started or not any(output.iterdir())


def check_whole(output: Path) -> None:
    """Every file can be read to its end, and nothing was left beside them."""
    from safetensors.torch import load_file

    hidden = [p.name for p in output.rglob(".*") if p.name != ".lock"]
    assert hidden == []
    for path in output.rglob("*"):
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in (".json", ".jsonl"):
            [json.loads(part) for part in lines_of(path)]
        elif path.suffix == ".html":
            assert path.read_text().endswith(">\n")
    assert len(list(output.glob("report/*"))) in (0, 3)
    for index in output.rglob("model_index.json"):
        parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        assert all(any((index.parent / part).iterdir()) for part in parts)


def lines_of(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def test_a_real_ctrl_c_in_a_real_process(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "inference" / "generate.py"), "a cat", "--model"]
    command += [str(folder / "model"), "--steps", "900", "--output", str(tmp_path / "a.png")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while b"/900" not in seen:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == DONE and said == b""
    assert error.splitlines()[-1] == b"stopped by Ctrl-C; no file was left half-written."
    assert b"Traceback" not in error and list(tmp_path.iterdir()) == []


def test_the_demo_waits_for_its_training_to_stop(tmp_path: Path) -> None:
    (tmp_path / "train_latent.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(1)\n"  # a checkpoint takes longer than subprocess.run waits by itself
        "    pathlib.Path('saved').write_text('all')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        "import sys, pathlib, demo; demo.HERE = pathlib.Path('.')\n"
        "demo.draw = demo.save = demo.make_images = lambda *_: []\n"
        "sys.exit(demo.main([]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'training'}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everything in it
    _, error = process.communicate(timeout=60)
    assert process.returncode == DONE and error == ""
    assert (tmp_path / "saved").read_text() == "all"


HALF_MADE = """
import signal, sys
from latentdiff.errors import command

class Bar:
    def __init__(self):
        signal.raise_signal(signal.SIGINT)
        self.closed = False

    def __del__(self):
        assert self.closed

sys.exit(command(lambda: Bar() and 0)())
"""


def test_what_a_signal_left_half_made_says_nothing() -> None:
    child = subprocess.run([sys.executable, "-c", HALF_MADE], stderr=subprocess.PIPE, check=False)
    assert child.returncode == DONE
    assert child.stderr == b"stopped by Ctrl-C; no file was left half-written.\n"


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_signal_within_a_destructor_is_not_lost(
    goes_on: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentdiff.errors import command

    class Closed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def main() -> int:
        Closed()
        while goes_on:
            time.sleep(0.001)
        return 0

    assert command(main)() == DONE
    assert capsys.readouterr().err == "stopped by Ctrl-C; no file was left half-written.\n"


def test_a_signal_in_the_last_moment_of_the_loop_is_not_lost() -> None:
    from latentdiff.train.loop import StopSignal

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), StopSignal() as noted:
            signal.raise_signal(signal.SIGINT)
            assert noted.number == signal.SIGINT  # and the block goes on to its end
    finally:
        signal.signal(signal.SIGINT, old)


def test_only_the_first_process_says_that_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentdiff.errors import Interrupted, UserError, command

    def ends(error: BaseException) -> int:
        def main() -> Any:
            raise error

        return command(main)()

    monkeypatch.setenv("RANK", "1")
    assert ends(KeyboardInterrupt()) == DONE
    assert ends(Interrupted(signal.SIGTERM, "stopped")) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == ""
    assert ends(UserError("no such file")) == 2
    assert capsys.readouterr().err == "error (process 1): no such file\n"
