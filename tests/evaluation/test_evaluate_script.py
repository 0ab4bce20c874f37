"""evaluate.py from the command line on a small model."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentdiff.cli.evaluate import parse, reference_of
from latentdiff.errors import UserError

SCRIPT = Path(__file__).parents[2] / "inference" / "evaluate.py"


def evaluate(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--concepts", "1"], "error: --concepts must be at least 2; got 1.\n"),
        (["--asks", "a", "--hub-metrics"], "error: --hub-metrics compares images of the ref"),
        ([], "error: --reference is required: gone, which is taken without it, is not there. "),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    given: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("latentdiff.cli.evaluate.EXAMPLE", Path("gone"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(words)


def test_a_reference_that_is_not_there_is_named_by_its_option(tmp_path: Path) -> None:
    args = parse(["--reference", str(tmp_path / "nope")])
    with pytest.raises(UserError, match=r"--reference: the folder .*nope does not exist"):
        reference_of(args, 2, SimpleNamespace(default_size=(64, 64)))


@pytest.mark.slow
def test_the_embedded_model_is_measured(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "stlpips_pytorch"):
        pytest.importorskip(package)
    sizes = ["--concepts", "12", "--steps", "4"]
    result = evaluate(*sizes, "--hub-metrics", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["prompts"] == figures["gallery"] == 12
    assert 0.8 <= figures["real through VAE: concept top-5"] <= 1
    assert figures["real through VAE: Fréchet distance"] < figures["Fréchet distance"]
    for name in ("FID (Inception)", "FD-DINOv2", "CMMD"):
        assert isinstance(figures[name], float) or figures[name].startswith("not measured: ")
    html = (tmp_path / "index.html").read_text()
    assert html.count("<figure>") == 12 + 48 and 'src="http' not in html


@pytest.mark.slow
def test_asks_are_measured_instead(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "stlpips_pytorch"):
        pytest.importorskip(package)
    file = tmp_path / "asks.jsonl"
    file.write_text('{"prompt": "a bell", "count": 1, "colour": "yellow", "seeds": 2}\n')
    result = evaluate("--asks", str(file), "--steps", "4", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["prompts: images"] == 2 and 0 <= figures["prompts: count"] <= 1
    assert figures["prompts: LPIPS between seeds"] >= 0 and "concept top-1" not in figures
    assert (tmp_path / "index.html").read_text().count("<figure>") == 2
