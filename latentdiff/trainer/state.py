"""What has to be kept so that a resumed run goes on as if it had never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.trainer.checkpoint import delete_old, latest, read_manifest, write_checkpoint
from latentdiff.trainer.diagnosis import check_weights
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.optimizer import load_named_state, named_state
from latentdiff.trainer.power_ema import AllAverages
from latentdiff.trainer.ranks import share
from latentdiff.trainer.sharding import local, release, rows
from latentdiff.trainer.tensor_files import read_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainingState:
    """Weights, their average and the optimizer, with the facts a resumed run must agree on.

    Order, noise and learning rate are functions of the step, so they need no state.
    """

    unet: nn.Module
    """The module itself, not its wrapper; its weights may be sharded."""
    ema: Ema | AllAverages
    """The moving averages of its weights."""
    optimizer: torch.optim.Optimizer
    """The optimizer itself, not its wrapper."""
    accelerator: Accelerator
    """The processes of the run."""
    folder: Path
    """Where the checkpoints are."""
    keep_last: int
    """How many of them are kept."""
    keep_every: int | None
    """Checkpoints after a multiple of so many steps are never deleted."""
    facts: dict[str, Any]
    """Dotted configuration keys and data fingerprints that decide the numbers."""
    whole: bool = True
    """Whether frozen weights are stored too; not where a pretrained model has them."""

    def save(self, step: int, seconds: float) -> None:
        """Write a checkpoint after `step` steps; every process writes its own rows.

        Raises: CheckpointError: on all processes; the earlier checkpoints are kept.
                UserError: likewise, when the run has diverged.
        """
        release(self.unet)
        tensors = {
            "unet": self._weights(),
            "ema": self.ema.placed(),
            "optimizer": named_state(self.optimizer, self.unet),
        }
        check_weights({"weight": tensors["unet"], "average": tensors["ema"]}, step)
        scaler = self.accelerator.scaler
        facts = {
            "seconds": seconds,
            "facts": self.facts,
            "processes": self.accelerator.num_processes,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "torch": torch.__version__,
        }
        write_checkpoint(self.folder, step, tensors, facts)
        if self.accelerator.is_main_process:
            delete_old(self.folder, self.keep_last, self.keep_every)

    def resume(self) -> tuple[int, float]:
        """Load the newest complete checkpoint; return (steps made, seconds spent).

        A run that was killed before its first checkpoint begins again: the same steps follow.
        Raises: UserError: the checkpoint belongs to a run that cannot be continued exactly.
        """
        # The first process decides: a folder on the network may look older to another one.
        checkpoint = share(latest(self.folder))[0]
        if checkpoint is None:
            return 0, 0.0
        manifest = read_manifest(checkpoint)
        _compare(manifest["facts"], self.facts, checkpoint)
        self._load(checkpoint)
        if self.accelerator.is_main_process:  # a kill may have come before the old ones were gone
            delete_old(self.folder, self.keep_last, self.keep_every)
        if self.accelerator.scaler is not None and manifest["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        return int(manifest["step"]), float(manifest["seconds"])

    def _weights(self) -> dict[str, Tensor]:
        state = self.unet.state_dict()
        if self.whole:
            return state
        return {n: state[n] for n, p in self.unet.named_parameters() if p.requires_grad}

    def _load(self, checkpoint: Path) -> None:
        weights = self._weights()
        parameters = dict(self.unet.named_parameters())

        def of_moment(key: str) -> slice | None:
            return rows(parameters[key.rpartition("/")[2]])

        stored = read_tensors(checkpoint, "unet", lambda key: rows(weights[key]))
        for name, weight in weights.items():
            local(weight).copy_(stored[name])
        release(self.unet)
        self.ema.load(read_tensors(checkpoint, "ema", of_moment))
        load_named_state(
            self.optimizer, self.unet, read_tensors(checkpoint, "optimizer", of_moment)
        )


def stored_facts(folder: Path) -> dict[str, Any] | None:
    """The manifest of the checkpoint that a run would go on from, if there is one."""
    checkpoint = share(latest(folder))[0]
    return read_manifest(checkpoint) if checkpoint is not None else None


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
