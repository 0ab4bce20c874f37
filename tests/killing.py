"""Trainings that end by SIGKILL at a chosen point: between two instructions that touch the disk,
in the middle of a file, or somewhere in a step.

Every such point is an event with a number. A process forked from one that has imported everything
runs the training and kills itself at event number n, so that a try costs seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]


class Fate:
    """Counts events and ends the process at one of them.

    Args:    at: number of the deadly event; −1 for none.
    Attributes: names: what has happened so far.
    """

    def __init__(self, at: int = -1) -> None:
        self.at, self.names = at, list[str]()

    def event(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        """Note an event. At the deadly one do only `half` of what follows, and die."""
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


def arm(fate: Fate, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Turn writing a checkpoint, writing the log and training into events."""
    import safetensors.torch

    from latentdiff.train import log as tracking
    from latentdiff.train.loop import OptimizerStep

    save_file, fsync, rename, unlink = safetensors.torch.save_file, os.fsync, os.rename, Path.unlink
    write_text, write_rows = Path.write_text, tracking.Tracker.write
    backward, update = OptimizerStep.backward, OptimizerStep.update

    def saving(tensors: Any, file: Any, metadata: Any = None) -> None:
        if "checkpoints" in str(file):
            data = safetensors.torch.save(tensors, metadata)
            fate.event("save", lambda: Path(file).write_bytes(data[: len(data) // 2]))
        save_file(tensors, file, metadata)

    def syncing(descriptor: int) -> None:
        fate.event("fsync")
        fsync(descriptor)

    def renaming(old: Any, new: Any, **more: Any) -> None:
        fate.event("rename")
        rename(old, new, **more)
        fate.event("renamed")

    def removing(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.name == "manifest.json":
            fate.event("manifest removed")

    def writing(path: Path, text: str, *more: Any, **named: Any) -> int:
        if path.name == "manifest.json":
            fate.event("manifest", lambda: write_text(path, text[: len(text) // 2]))
        return write_text(path, text, *more, **named)

    def logging(tracker: Any, rows: list[dict[str, Any]]) -> None:
        def half() -> None:
            with open(tracker._path, "a", encoding="utf-8") as file:
                file.write('{"step": 1')

        fate.event("log", half)
        write_rows(tracker, rows)

    def stepping(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *given: Any) -> Any:
            fate.event(name)
            return real(self, *given)

        return call

    patch(safetensors.torch, "save_file", saving)
    patch(os, "fsync", syncing)
    patch(os, "rename", renaming)
    patch(Path, "unlink", removing)
    patch(Path, "write_text", writing)
    patch(tracking.Tracker, "write", logging)
    patch(OptimizerStep, "backward", stepping("backward", backward))
    patch(OptimizerStep, "update", stepping("update", update))


def in_fork(target: Callable[..., None], *arguments: Any) -> int | None:
    """Call in a process forked from one that has imported everything; return how that ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killing_preload"])
    process = context.Process(target=target, args=arguments)
    folders = [str(ROOT), str(ROOT / "training"), str(ROOT / "tests")]
    with pytest.MonkeyPatch.context() as patch:
        # The server starts with the first process; it finds what it imports by the variable alone.
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        process.start()
    process.join()
    return process.exitcode


def train(arguments: list[str], at: int = -1) -> int | None:
    """Run train_latent.py in a process of its own; return how it ended (−9 when killed)."""
    return in_fork(_train, arguments, at)


def _train(arguments: list[str], at: int) -> None:
    from train_latent import main

    arm(Fate(at))
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)
