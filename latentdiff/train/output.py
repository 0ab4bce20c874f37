"""The output folder of a run: never mixed with another run's, never written by two at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from latentdiff.errors import UserError
from latentdiff.train.checkpoint import latest

CHECKPOINTS, SAMPLES = "checkpoints", "samples"
_LOCK = ".lock"
#: The checkpoint of train_autoencoder.py and train_clip.py before they had folders of them.
_OLD_STATE = "state.pt"


def check_output(folder: Path, resume: bool) -> None:
    """Look, without writing, whether a run may use the folder.

    Raises: UserError: it holds something already (new run), or nothing to resume from, or cannot
        be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder} is a file, not a folder. Choose another output=FOLDER.")
    found = _contents(folder)
    checkpoint = latest(folder / CHECKPOINTS)
    if resume and _OLD_STATE in found and checkpoint is None:
        raise UserError(
            f"--resume: {folder / _OLD_STATE} is a checkpoint of an earlier version of latentdiff, "
            "and only that version can go on with it. Start a new run in another output=FOLDER."
        )
    if resume and not is_started(folder):
        holds = f"it holds {', '.join(found[:6])}" if found else "it is empty or not there"
        raise UserError(
            f"--resume: output={folder} has no complete checkpoint ({holds}). Leave --resume out "
            "to start, or give the folder of the run to go on with: output=FOLDER."
        )
    if not resume and found:
        hint = "add --resume to go on with it, or choose" if checkpoint is not None else "choose"
        raise UserError(
            f"output={folder} is not empty (it holds {', '.join(found[:6])}), and nothing is ever "
            f"overwritten: {hint} another output=FOLDER, or move that one away."
        )
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise _unwritable(folder, f"{parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"no permission to write to {parent}")


def _contents(folder: Path) -> list[str]:
    """What is there already, without what a run makes before it has done anything."""
    if not folder.is_dir():
        return []
    empty = {name for name in (CHECKPOINTS, SAMPLES) if not any((folder / name).glob("*"))}
    return sorted(path.name for path in folder.iterdir() if path.name not in {_LOCK, *empty})


def is_started(folder: Path) -> bool:
    """Whether a run was started in the folder, so that it can be resumed."""
    return latest(folder / CHECKPOINTS) is not None or (folder / "config.yaml").is_file()


def open_output(folder: Path) -> IO[str]:
    """Make the folder and lock it for this process; keep the returned file open.

    Raises: UserError: it cannot be written, or another process is training there.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "a", encoding="utf-8")  # noqa: SIM115  (open while we train)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # no file locks on this platform
    except OSError as error:
        lock.close()
        raise UserError(
            f"another process is training in output={folder}. If you launched one run on several "
            "processes, they do not know of each other: see docs/sharding.md. "
            "Otherwise choose another output=FOLDER."
        ) from error
    return lock


def _unwritable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"output={folder} cannot be written ({reason}). "
        "Choose a folder that you may write to: output=FOLDER."
    )
