"""Command lines that get Ctrl-C at a chosen call of a Python function, each in its own process.

A fork of a process that has imported everything runs the command, so a try costs a second.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from killing import in_fork

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]


class Script:
    """The main() of a script by its name, found in the process that runs it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        """The function itself."""
        folder = "inference" if (ROOT / "inference" / f"{self.name}.py").exists() else "training"
        return runpy.run_path(str(ROOT / folder / f"{self.name}.py"))["main"]

    def __call__(self, words: list[str]) -> int:
        return self.load()(words)


def console(words: list[str]) -> int:
    """The command `latentdiff`."""
    from latentdiff.__main__ import main

    sys.argv = ["latentdiff", *words]
    return main()


def evaluate(words: list[str]) -> int:
    """evaluate.py with figures that are there already: measuring them takes minutes."""
    main = Script("evaluate").load()
    figures = {"model": "m"}, {"Concepts": []}
    main.__wrapped__.__globals__["evaluate"] = lambda args: figures
    return main(words)


def run(main: Callable[[list[str]], int], words: list[str], log: Path, at: int = -1) -> int | None:
    """Run a command with Ctrl-C at call number `at` within main(); −1: none.

    What it says goes to `log`; the number of calls to a file beside it, `.calls`.
    Returns: how it ended.
    """
    return in_fork(_run, main, words, log, at)


def _run(main: Callable[[list[str]], int], words: list[str], log: Path, at: int) -> None:
    count, outer = 0, None

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count, outer
        if frame is outer and event == "return":
            sys.setprofile(None)
        elif outer is None:
            outer = frame if event == "call" and frame.f_code.co_name == "main" else None
        elif event == "call":
            count += 1
            # Python itself swallows what is raised in a finalizer.
            if count > at >= 0 and frame.f_code.co_name != "__del__":
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    from latentdiff.train import log as flops

    flops.count_flops = lambda *given, **more: 1  # a quarter of a tiny training
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as sys.stderr:
        sys.setprofile(note)
        code = main(words)
        sys.setprofile(None)
    log.with_suffix(".calls").write_text(str(count))
    sys.stdout.flush()
    os._exit(code)
