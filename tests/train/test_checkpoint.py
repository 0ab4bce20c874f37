import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.errors import UserError
from latentdiff.train.checkpoint import (
    CheckpointError,
    _compare,
    checkpoints,
    delete_old,
    latest,
    read_manifest,
    read_tensors,
    write_checkpoint,
)

TENSORS = {"unet": {"w": torch.arange(6.0).reshape(2, 3).T}}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 7, TENSORS, {"seconds": 1.5})
    assert latest(tmp_path) == path
    assert read_manifest(path)["seconds"] == 1.5
    assert read_manifest(path)["step"] == 7
    assert torch.equal(read_tensors(path, "unet")["w"], TENSORS["unet"]["w"])


@pytest.mark.parametrize(
    "damage",
    [
        *('{"step": 2, "fil', "[]", '{"step": 2}', '{"step": [], "seconds": 0, "files": {}}'),
        *('{"step": 2, "seconds": 0, "files": []}', '{"facts": 1}', "[" * 100_000),
        *("short file", "no file", "no manifest"),
    ],
)
def test_incomplete_checkpoints_do_not_count(tmp_path: Path, damage: str) -> None:
    good = write_checkpoint(tmp_path, 1, TENSORS, {})
    bad = write_checkpoint(tmp_path, 2, TENSORS, {})
    if damage == "no manifest":
        (bad / "manifest.json").unlink()
    elif damage == "short file":
        (bad / "unet.safetensors").write_bytes(b"short")
    elif damage == "no file":
        (bad / "unet.safetensors").unlink()
    else:
        (bad / "manifest.json").write_text(damage)
    assert latest(tmp_path) == good


def test_failing_while_writing_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="step 1 could not be written: No space"):
        write_checkpoint(tmp_path, 1, TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_the_system_refusing_to_write_more_keeps_the_one_before(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 1, TENSORS, {})
    pid = os.fork()
    if pid == 0:  # a limit on file sizes cannot be taken back, so it is set in a child
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        code = 1
        try:
            write_checkpoint(tmp_path, 2, {"unet": {"w": torch.zeros(9000)}}, {})
        except CheckpointError:
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert torch.equal(read_tensors(good, "unet")["w"], TENSORS["unet"]["w"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / ".partial-step-00000011").mkdir()
    (tmp_path / "step-00000000").mkdir()  # as a kill within the deleting leaves it
    delete_old(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_every_so_many_steps_one_is_kept_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 30):
        write_checkpoint(tmp_path, step, TENSORS, {})
        delete_old(tmp_path, 1, keep_every=10)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [10, 20, 30]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 1, TENSORS, {})
    (path / "unet.safetensors").write_bytes(b"x" * (path / "unet.safetensors").stat().st_size)
    with pytest.raises(UserError, match="step-00000001"):
        read_tensors(path, "unet")


@pytest.mark.parametrize("offsets", ["{", "[]", "nonsense"])
def test_offsets_that_are_damaged_name_the_file(tmp_path: Path, offsets: str) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    piece = folder / "unet-00001-of-00001.safetensors"
    save_file({"w": torch.zeros(2)}, piece, {"DCP_SHARDING_INFO": offsets})
    with pytest.raises(UserError, match=r"step-00000001/unet.*cannot be read.*unet-00001"):
        read_tensors(folder, "unet")


@pytest.mark.parametrize(
    ("then", "now", "refused"),
    [
        ({"a": 1}, {"a": 1, "b": 0}, ""),  # b is newer than the checkpoint, and as it always was
        ({"a": 1}, {"a": 1, "b": 5}, "b: 0 then, 5 now"),
        ({"a": 1, "b": 0}, {"a": 1}, ""),  # b is gone since
        ({"a": 1, "b": 5}, {"a": 1}, "b: 5 then, 0 now"),
        ({"a": 1}, {"a": 2}, "a: 1 then, 2 now"),
        ({"a": 1, "images": "x"}, {"a": 1, "images": "y"}, "colour profiles"),
    ],
)
def test_an_option_that_one_side_lacks_has_its_default(
    then: dict[str, Any], now: dict[str, Any], refused: str
) -> None:
    if not refused:
        return _compare(then, now, {"a": 1, "b": 0}, Path("x"))
    with pytest.raises(UserError, match=refused):
        _compare(then, now, {"a": 1, "b": 0}, Path("x"))


def test_facts_of_earlier_versions_have_the_names_of_today(tmp_path: Path) -> None:
    facts = {"pictures per step": 4, "training pictures": 9}
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1, "facts": facts}))
    assert read_manifest(tmp_path)["facts"] == {"images per step": 4, "training images": 9}
