"""`latentdiff` given files of strangers: what it claims, what it prints, and to whom."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.__main__ import main
from latentdiff.cli import convert as convert
from latentdiff.cli import inspect as inspect
from latentdiff.formats.folder import load_components
from latentdiff.formats.model import save_model
from latentdiff.formats.single_file import save_single_file
from tests.random_models import make_pipeline

VAE, TEXT = "first_stage_model.", "cond_stage_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return save_model(folder.with_name("model.safetensors"), load_components(folder))


def what(path: Path | str, capsys: Any) -> str:
    assert inspect.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return next(line for line in lines if line.startswith("what"))


def without(start: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(start)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors, "; opens here"),
        (without(VAE), "does not open: .* missing: first_stage_model"),
        (without(TEXT), "does not open: .* missing: cond_stage_model"),
        (without(f"{VAE}quant_conv.bias"), "does not open: .* 1 missing: first_stage_model.quant"),
        (lambda t: t | {"odd": torch.zeros(1)}, "does not open: .* 1 unexpected: odd"),
        (
            lambda t: t | {f"{VAE}quant_conv.bias": torch.zeros(3)},
            "does not open: .* 1 of another shape: quant_conv.bias",
        ),
    ],
)
def test_opens_here_is_said_of_what_opens(
    change: Callable[[Any], Any], words: str, file: Path, tmp_path: Path, capsys: Any
) -> None:
    with safe_open(file, "pt") as opened:
        meta = opened.metadata()
    changed = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), changed, meta)
    assert re.search(words, what(changed, capsys))
    opens = convert.main([str(changed), str(tmp_path / "again")]) == 0
    assert opens == ("opens here" in words)


def test_a_folder_that_does_not_open(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert "; opens here" in what(folder, capsys)
    copy = shutil.copytree(folder, tmp_path / "model")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(without("quant_conv.bias")(load_file(weights)), weights)
    assert "does not open: the weights in" in what(copy, capsys)


def test_hub_ids(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    asked = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        if "bad" in name:
            raise ConnectionError("no route to \x1b[31mhost")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert inspect.main(["owner/name"]) == 0
    found = capsys.readouterr().out
    assert inspect.main([str(folder)]) == 0
    assert capsys.readouterr().out == found and asked == ["owner/name"]
    assert inspect.main(["owner/bad"]) == 2
    assert r"could not be fetched" in (said := capsys.readouterr().err)
    assert r"\x1b[31mhost" in said and "\x1b" not in said


EVIL = "\x1b]0;title\x07\x9b2J\u202eexe"


def test_nothing_acts_on_the_terminal(
    folder: Path, file: Path, tmp_path: Path, capsys: Any
) -> None:
    strange = tmp_path / f"a{EVIL}"
    strange.mkdir()
    meta = {"modelspec.title": EVIL, f"modelspec.{EVIL}": "x", f"ss_{EVIL}": EVIL + "\nline"}
    lora = {f"lora_unet_{EVIL}_attn2_to_k.lora_down.weight": torch.zeros(4, 768)}
    save_file(lora, strange / "lora.safetensors", meta)
    save_file({f"weird{EVIL}": torch.zeros(2)}, strange / "weird.safetensors", meta)
    torch.save({"global_step": 1, EVIL: EVIL, "a": torch.zeros(2)}, strange / "facts.ckpt")
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}, "name": EVIL}, strange / "word.pt")
    (strange / "text.ckpt").write_text("error: " + "é" * 9 + EVIL)
    (strange / "web.ckpt").write_text("<html>")
    copy = shutil.copytree(folder, strange / "model")
    names = [f.name for f in strange.iterdir()]
    extra = {"model_ema.x" + EVIL: torch.zeros(1)}
    with safe_open(file, "pt") as opened:
        save_file(load_file(file) | extra, strange / "m.safetensors", opened.metadata() | meta)
    calls = [["inspect", "--keys", str(strange / name)] for name in [*names, "m.safetensors"]]
    calls += [["inspect", str(strange / "none")], ["inspect", str(strange)]]
    calls += [["convert", str(strange / "m.safetensors"), str(strange / "new")]]
    calls += [["convert", str(strange / "new"), str(copy)]]
    for word, *arguments in calls:
        {"inspect": inspect, "convert": convert}[word].main(arguments)
        out, err = capsys.readouterr()
        assert r"\x1b]0;title\x07\x9b2J\u202eexe" in out + err, (word, arguments)
        steering = [sign for sign in out + err if not sign.isprintable() and sign != "\n"]
        assert not steering, (word, arguments)


def test_a_reader_that_leaves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `latentdiff … | head` when head has ended."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a square")
    report = ["--output", str(tmp_path / "report")]
    for arguments in (
        ["inspect", "--keys", str(folder)],
        ["convert", str(folder), str(tmp_path / "new")],
        ["doctor", str(tmp_path / "images"), *report, "data.image_size=8"],
        ["--help"],
    ):
        reading, writing = os.pipe()
        os.close(reading)
        with monkeypatch.context() as patch, os.fdopen(writing, "w") as stdout:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "argv", ["latentdiff", *arguments])
            assert main() == 128 + 13, arguments
    assert (tmp_path / "new" / "model_index.json").is_file()


def test_a_reader_that_leaves_hears_nothing_at_exit(file: Path) -> None:
    command = [sys.executable, "-m", "latentdiff", "inspect", "--keys", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + 13


def test_a_title_is_shown_in_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "model.safetensors"
    save_single_file(target, load_components(folder), title="A\nB " + "x" * 10**6)
    assert inspect.main([str(target)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("title")).split()[1:3] == ["A", "B"]
    assert max(map(len, lines)) < 400
