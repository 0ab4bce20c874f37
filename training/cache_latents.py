"""Encode the pictures of a training before it starts, on any number of processes or machines.

    accelerate launch training/cache_latents.py [--config FILE] [section.key=value ...]
    python training/cache_latents.py --rank 2 --ranks 8 ...   (one of eight jobs, with no launcher)

Takes the same configuration as train_latent.py, which then finds every latent in the cache. The
processes never talk to each other: each takes its own blocks of pictures and commits each as a
whole. Whatever is killed, start it again, on as many processes as you like, and only what is
missing is encoded; when nothing is, nothing happens.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.config import describe
from latentdiff.data.encoder import Encoder
from latentdiff.data.latents import Encoding, LatentFolder
from latentdiff.data.source import open_source, problems_of, report_skipped
from latentdiff.errors import command
from latentdiff.train.checkpoint import default_cache
from latentdiff.train.config import Given, TrainConfig, read_config
from latentdiff.train.run import Worker, frozen_autoencoder, this_worker


def cache(given: Given, worker: Worker) -> None:
    """Do this process's share and say how far the whole is."""
    source = open_source(given.config.data)
    autoencoder, config = frozen_autoencoder(given)
    place = Path(config.latents.cache_dir or default_cache())
    folder = LatentFolder(place, Encoder(autoencoder, config.data, worker.device))
    work = Encoding(source, folder, config.latents.batch_size)
    name = f"process {worker.rank} of {worker.ranks}"
    if work.index() is not None:
        print(f"{name}: all {len(source)} pictures are in {folder.path}; nothing to do", flush=True)
        return
    done = work.run(worker.rank, worker.ranks, progress=worker.rank == 0)
    print(f"{name}: {done.encoded} pictures encoded, {done.blocks} blocks", flush=True)
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
    print(f"{name}: the cache is complete: {usable} pictures in {folder.path}", flush=True)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="configuration keys (given as key=value):\n\n" + describe(TrainConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of the training")
    parser.add_argument("--rank", type=int, help="number of this process, from 0")
    parser.add_argument("--ranks", type=int, help="how many processes there are")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    worker = this_worker(options.rank, options.ranks)
    cache(read_config(options.config, options.overrides), worker)


if __name__ == "__main__":
    sys.exit(main())
