"""The part of a training run that encodes its pictures, to be done before and by many processes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.trainer.config import Given, TrainConfig


class Worker(NamedTuple):
    """Which process this is; it never speaks to the others."""

    rank: int
    ranks: int
    device: torch.device


def this_worker(rank: int | None = None, ranks: int | None = None) -> Worker:
    """Find out from the launcher's environment, where the caller does not say.

    Args:    rank, ranks: this process's number and how many there are; both or neither.
    Raises:  UserError: one without the other, or rank outside 0 … ranks − 1.
    """
    if (rank is None) != (ranks is None):
        raise UserError("--rank and --ranks belong together: --rank 0 --ranks 4, say.")
    if rank is None or ranks is None:
        rank, ranks = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < ranks:
        raise UserError(f"--rank must lie in 0 … {ranks - 1} for --ranks {ranks}; got {rank}.")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return Worker(rank, ranks, torch.device("cpu"))
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    return Worker(rank, ranks, torch.device(found.type, local))


def frozen_autoencoder(given: Given) -> tuple[Any, TrainConfig]:
    """The autoencoder and picture size that train_latent.py takes for the same configuration.

    The U-Net and the text encoder stay closed: of a pretrained model only its picture size is read.
    Raises: UserError: no such model.
    """
    from latentdiff.formats.model import latent_size, open_autoencoder

    config, model = given.config, given.config.model
    base: str | Path = EMBEDDED_MODEL
    if model.pretrained is not None and model.pretrained != "embedded":
        base = model.pretrained
    revision = model.revision if model.vae is None else None
    autoencoder = open_autoencoder(base if model.vae is None else model.vae, revision)
    if model.pretrained is None or "data.image_size" in given.keys:
        return autoencoder, config
    size = latent_size(base, model.revision)
    if not isinstance(size, int):
        return autoencoder, config
    data = dataclasses.replace(config.data, image_size=size * autoencoder.downscale)
    return autoencoder, dataclasses.replace(config, data=data)
