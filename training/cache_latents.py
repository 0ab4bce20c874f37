"""Encode the images of a training before it starts, on any number of processes or machines.

    accelerate launch training/cache_latents.py [--config FILE] [section.key=value ...]
    python training/cache_latents.py --rank 2 --ranks 8 ...   (one of eight jobs, with no launcher)

Takes the same configuration as train_latent.py, which then finds every latent in the cache. The
processes never talk to each other: each takes its own blocks of images and commits each as a
whole. Whatever is killed, start it again, on as many processes as you like, and only what is
missing is encoded; when nothing is, nothing happens.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from latentdiff.data.encoder import Encoder
from latentdiff.data.latents import CacheBuilder, LatentFolder
from latentdiff.data.source import open_source, problems_of, report_skipped
from latentdiff.errors import UserError, command
from latentdiff.files import default_cache
from latentdiff.train.arguments import config_parser
from latentdiff.train.config import Given, TrainConfig, read_config
from latentdiff.train.parts import frozen_autoencoder


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


def cache(given: Given, worker: Worker) -> None:
    """Do this process's share and say how far the whole is."""
    source = open_source(given.config.data)
    autoencoder, config = frozen_autoencoder(given)
    place = Path(config.latents.cache_dir or default_cache())
    folder = LatentFolder(place, Encoder(autoencoder, config.data, worker.device))
    work = CacheBuilder(source, folder, config.latents.batch_size)
    name = f"process {worker.rank} of {worker.ranks}"
    if work.index() is not None:
        print(f"{name}: all {len(source)} images are in {folder.path}; nothing to do", flush=True)
        return
    done = work.run(worker.rank, worker.ranks, progress=worker.rank == 0)
    print(f"{name}: {done.encoded} images encoded, {done.blocks} blocks", flush=True)
    index = work.index()
    if index is None:
        print(
            f"{name}: {work.missing()} of {len(work.blocks)} blocks are with other processes. The "
            "last one to end says that the cache is complete; if none does, start again."
        )
        return
    skipped = [*problems_of(source), *index.skipped]
    usable = int((index.buckets >= 0).sum())
    print(report_skipped(skipped) + "\n" * bool(skipped), end="")
    print(f"{name}: the cache is complete: {usable} images in {folder.path}", flush=True)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = config_parser(TrainConfig, __doc__)
    parser.add_argument("--rank", type=int, help="number of this process, from 0")
    parser.add_argument("--ranks", type=int, help="how many processes there are")
    options = parser.parse_intermixed_args(arguments)
    worker = this_worker(options.rank, options.ranks)
    cache(read_config(options.config, options.overrides), worker)


if __name__ == "__main__":
    sys.exit(main())
