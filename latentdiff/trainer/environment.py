"""What a run ran on: every start of it adds to OUTPUT/environment.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.atomic import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

ENVIRONMENT = "environment.json"
_PACKAGES = ("latentdiff", "torch", "diffusers", "transformers", "accelerate", "safetensors")


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Versions, machine and processes as JSON values."""
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": gpu or str(device),
        "processes": accelerator.num_processes,
        "distribution": str(accelerator.distributed_type).rpartition(".")[2],
        "precision": accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "commit": _commit(),
        **{name: _version(name) for name in _PACKAGES},
    }


def write_environment(folder: Path, facts: dict[str, Any]) -> None:
    """Add this start of the run to OUTPUT/environment.json, a list of all of them."""
    file = folder / ENVIRONMENT
    text = json.dumps([*read_environment(folder), facts], indent=2) + "\n"
    write_text(file, text)


def read_environment(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, the first one first; empty if there is no record."""
    try:
        return json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, marked if it was changed; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
