"""What has to be kept so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from latentdiff.errors import UserError
from latentdiff.trainer.checkpoint import (
    delete_old,
    latest,
    read_manifest,
    read_tensors,
    write_checkpoint,
)
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.optimizer import load_named_state, named_state
from latentdiff.trainer.power_ema import AllAverages

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainingState:
    """Weights, their average and the optimizer, with the facts a resumed run must agree on.

    Order, noise and learning rate are functions of the step, so they need no state.
    """

    unet: nn.Module
    """The module itself, not its wrapper."""
    ema: Ema | AllAverages
    """The moving averages of its weights."""
    optimizer: torch.optim.Optimizer
    """The optimizer itself, not its wrapper."""
    accelerator: Accelerator
    """Only the main process writes."""
    folder: Path
    """Where the checkpoints are."""
    keep_last: int
    """How many of them are kept."""
    facts: dict[str, Any]
    """Dotted configuration keys and data fingerprints that decide the numbers."""

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint after `step` steps; all processes wait for it."""
        if self.accelerator.is_main_process:
            tensors = {
                "unet": self.unet.state_dict(),
                "ema": self.ema.average,
                "optimizer": named_state(self.optimizer, self.unet),
            }
            scaler = self.accelerator.scaler
            facts = {
                "seconds": seconds,
                "facts": self.facts,
                "processes": self.accelerator.num_processes,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "torch": torch.__version__,
            }
            write_checkpoint(self.folder, step, tensors, facts)
            delete_old(self.folder, self.keep_last)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[int, float]:
        """Load the newest complete checkpoint; return (steps made, seconds spent).

        A run that was killed before its first checkpoint begins again: the same steps follow.
        Raises: UserError: the checkpoint belongs to a run that cannot be continued exactly.
        """
        checkpoint = latest(self.folder)
        if checkpoint is None:
            return 0, 0.0
        manifest = read_manifest(checkpoint)
        _compare(manifest["facts"], self.facts, checkpoint)
        self.unet.load_state_dict(read_tensors(checkpoint, "unet"))
        self.ema.load(read_tensors(checkpoint, "ema"))
        load_named_state(self.optimizer, self.unet, read_tensors(checkpoint, "optimizer"))
        if self.accelerator.scaler is not None and manifest["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        return int(manifest["step"]), float(manifest["seconds"])


def _compare(stored: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    missing = object()
    lines = [
        f"  {key}: {stored.get(key, '(not there)')!r} then, {now.get(key, '(not there)')!r} now"
        for key in {**stored, **now}
        if stored.get(key, missing) != now.get(key, missing)
    ]
    if lines:
        raise UserError(
            f"--resume: {checkpoint} was written with other settings, so the run would not go on "
            "exactly as it began:\n" + "\n".join(lines) + "\nSet them back, or start a run of its "
            "own in another output folder."
        )
