"""Output folders of the training stages: what is there is never lost, and said before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn, optim

from latentdiff.errors import UserError
from latentdiff.train.stage import STATE_FILE, Stage, StageConfig, check_stage_output


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
