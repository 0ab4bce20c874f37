"""How many cores a launched run has on a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import torch
from latentdiff.train.distributed import start_processes
start_processes("no", cpu=True)
# The launcher runs Python unbuffered: one write, or the lines of two processes mix.
print(f"threads {torch.get_num_threads()}\\n", end="")
"""
CORES = psutil.cpu_count(logical=False) or 1
if hasattr(os, "sched_getaffinity"):
    CORES = min(CORES, len(os.sched_getaffinity(0)))
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def threads(tmp_path: Path, launcher: tuple[str, ...], count: int = 1, **extra: str) -> list[int]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | extra
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    more = ("--standalone", "--nproc_per_node", str(count)) if launcher is TORCHRUN else ()
    done = subprocess.run(
        [*launcher, *more, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in re.findall(r"threads (\d+)", done.stdout)]


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
@pytest.mark.parametrize("launcher", [(sys.executable,), ACCELERATE, TORCHRUN])
def test_one_process_has_every_core(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    assert threads(tmp_path, launcher) == [CORES]


@pytest.mark.skipif(CORES < 2, reason="needs two cores")
def test_processes_share_the_cores(tmp_path: Path) -> None:
    assert threads(tmp_path, TORCHRUN, CORES) == [1] * CORES


@pytest.mark.parametrize("launcher", [(sys.executable,), ACCELERATE])
def test_what_a_person_set_stands(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    assert threads(tmp_path, launcher, OMP_NUM_THREADS="1") == [1]


def test_threads_that_a_person_asks_the_launcher_for_stand(tmp_path: Path) -> None:
    assert threads(tmp_path, (*ACCELERATE, "--num_cpu_threads_per_process", "1")) == [1]
