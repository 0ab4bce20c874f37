"""Starting scripts as `accelerate launch` does, with the shipped configurations, on the CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "training" / "accelerate"


def launch(
    script: Path, arguments: list[str], config: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script under a configuration of training/accelerate until it ends.

    Args:    options: further options of `accelerate launch`.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(CONFIGS / config), "--main_process_port", "0"]
    return subprocess.run(
        [*command, *options, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment,
    )


def free_port() -> int:
    """One on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
