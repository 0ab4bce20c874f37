"""Does the data keep up, and does memory stay flat, with a million latents on the disk?

    python benchmarks/loader.py [--count 1000000] [--steps 120] [--context-megabytes 32]
        [--plot FILE.png]

Writes COUNT synthetic latents (4x16x16: 4 KB of moments each) into a temporary folder, reads every
one of them once in training order on one core, then trains the default network on them for STEPS
steps. Prints latents per second of the loader alone and the share of the training's time that was
spent waiting for data, plots the memory of the process, deletes the folder. Text states are kept
in --context-megabytes (latents.context_megabytes of a training, 1024 there): 20 steps fill 32.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import torch

from latentdiff.data.latents import LatentCache, LatentIndex, Shards, key_array, write_shard
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, command
from latentdiff.train.batches import BatchMaker, BatchShape, Order, Prefetch, choose_caption
from latentdiff.train.config import TrainConfig

SHAPE = (8, 16, 16)
BATCH = 24
#: So many latents differ in more than their first two values; making a million takes long.
POOL = 4096
Memory = list[tuple[float, float]]


class Synthetic:
    """A source of `count` captions; its images exist as latents only."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def captions(self, index: int) -> tuple[str, ...]:
        """Two captions, made when asked for."""
        return (f"image {index}", f"another caption of image {index}")

    def name(self, index: int) -> str:
        """Its number."""
        return str(index)


def key(index: int) -> str:
    """The key of one latent."""
    return hashlib.blake2b(str(index).encode(), digest_size=16).hexdigest()


def write(folder: Path, count: int) -> None:
    """Write the latents; the first two values of each say which one it is."""
    need, free = int(1.05 * count * 2 * np.prod(SHAPE)), shutil.disk_usage(folder).free
    if free < need + 2**30:
        raise UserError(f"{need / 1e9:.1f} GB are needed in {folder}; {free / 1e9:.1f} are free.")
    pool = torch.randn(POOL, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    for start in range(0, count, POOL):
        numbers = torch.arange(start, min(start + POOL, count))
        part = pool[: len(numbers)]
        part[:, 0, 0, 0], part[:, 0, 0, 1] = numbers % 2048, numbers // 2048
        write_shard(folder, [key(n) for n in numbers.tolist()], part)


def open_cache(folder: Path, count: int) -> LatentCache:
    """Open them as training opens its cache."""
    keys = key_array(key(n) for n in range(count))
    index = LatentIndex(np.zeros(count, np.int16), keys, [])
    store = Shards(folder, SHAPE)
    place: Any = SimpleNamespace(path=folder, shapes=[SHAPE], stores=[store], masked=False)
    source: Any = Synthetic(count)
    return LatentCache(source, place, index, [])


def resident() -> float:
    """Memory of this process in MB."""
    return psutil.Process().memory_info().rss / 1e6


def read_all(cache: LatentCache, seed: int) -> tuple[dict[str, float], Memory]:
    """One epoch: order, moments in float32, caption. Raises: UserError: a wrong latent."""
    memory, count = list[tuple[float, float]](), len(cache)
    wall, cpu = time.perf_counter(), time.process_time()
    order = Order(range(count), seed)
    for start in range(0, count, BATCH):
        samples = range(start, min(start + BATCH, count))
        rows = order(samples)
        moments = cache.read(rows).moments.float()
        captions = [
            choose_caption(cache.captions(row), seed, n)
            for row, n in zip(rows, samples, strict=True)
        ]
        if start // BATCH % 500 == 0:
            memory.append((start / 1e6, resident()))
            found = (moments[:, 0, 0, 0] + 2048 * moments[:, 0, 0, 1]).long().tolist()
            if found != rows or not captions[0].endswith(str(rows[0])):
                raise UserError(f"asked for the latents {rows}, got {found}.")
    speed = {
        "latents per second of one core": count / (time.process_time() - cpu),
        "latents per second of wall time": count / (time.perf_counter() - wall),
    }
    return speed, memory


def batches_with_noise(make: BatchMaker, seconds: float = 2.0) -> float:
    """Latents per second of one core with noise, timesteps and everything else but text states."""
    cpu, step = time.process_time(), 0
    while time.process_time() - cpu < seconds:
        make(step, 0)
        step += 1
    return step * BATCH / (time.process_time() - cpu)


def train(cache: LatentCache, steps: int, room: int) -> tuple[dict[str, float], Memory]:
    """Train the default network; returns the share of waiting and the memory per step.

    Args: room: megabytes for the states of texts.
    """
    from latentdiff.diffusion.objective import per_sample_loss
    from latentdiff.embedded import EMBEDDED_MODEL
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.clip_text import load_text_encoder
    from latentdiff.models.unet import UNet
    from latentdiff.train.batches import ContextCache
    from latentdiff.train.optimizer import make_optimizer

    config, channels = TrainConfig(), SHAPE[0] // 2
    text = load_text_encoder(EMBEDDED_MODEL / "text_encoder", EMBEDDED_MODEL / "tokenizer")
    shape = dataclasses.replace(
        config.model.unet,
        in_channels=channels,
        out_channels=channels,
        cross_attention_dim=text.width,
    )
    unet = UNet(shape).init_for_training().train()
    schedule, optimizer = NoiseSchedule(config.schedule), make_optimizer(unet, config.optimizer)
    autoencoder = load_autoencoder(EMBEDDED_MODEL / "vae")
    context = ContextCache(text.encode, max_bytes=room * 2**20)
    make = batch_maker(cache, context, config, schedule)
    batches = Prefetch(make, ((step, 0) for step in range(steps)))
    memory: Memory = []
    began = waited = 0.0
    for step, _, batch in batches:
        if step == 1:  # the first batch is waited for by everyone, and the first step allocates
            began, waited = time.perf_counter(), batches.waited
        x_0 = autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        losses = per_sample_loss(unet, x_0, batch.context, batch.draw, schedule, config.objective)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        memory.append((step, resident()))
    elapsed = time.perf_counter() - began
    figures = {
        "data-wait share": (batches.waited - waited) / elapsed,
        "images per second": (steps - 1) * BATCH / elapsed,
    }
    return figures, memory


def batch_maker(
    cache: LatentCache, context: Callable[[Any], Any], config: TrainConfig, schedule: Any
) -> BatchMaker:
    """What train_latent.py makes its batches with."""
    maker: Any = BatchMaker(
        cache,
        Order(range(len(cache)), 0),
        BatchShape(BATCH),
        context,
        config.objective,
        schedule,
        torch.device("cpu"),
    )
    return maker


def plot(target: Path, reading: Memory, training: Memory) -> None:
    """Memory of the process against what it has read and trained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for axis, memory, label in (
        (axes[0], reading, "million latents read"),
        (axes[1], training, "training step"),
    ):
        if memory:
            axis.plot(*zip(*memory, strict=True))
            axis.set(xlabel=label, ylabel="resident memory (MB)")
            axis.set_ylim(0, 1.25 * max(value for _, value in memory))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def growth(memory: Memory) -> float:
    """MB by which the mean of the last tenth is above that of the second tenth."""
    tenth = max(1, len(memory) // 10)
    values = [value for _, value in memory]
    return float(np.mean(values[-tenth:]) - np.mean(values[tenth : 2 * tenth] or values))


def measure(
    count: int,
    steps: int,
    where: Path | None = None,
    image: Path | None = None,
    room: int = 32,
) -> tuple[dict[str, float], Memory, Memory]:
    """Write, read, train; returns the figures and the memory of reading and of training.

    `image` is plotted twice: training may take long, and be interrupted.
    """
    with tempfile.TemporaryDirectory(dir=where, prefix="latentdiff-loader-") as name:
        folder = Path(name)
        started = time.perf_counter()
        write(folder, count)
        print(f"{count} latents written in {time.perf_counter() - started:.0f} s", flush=True)
        started = time.perf_counter()
        cache = open_cache(folder, count)
        figures = {"latents": float(count), "opened in seconds": time.perf_counter() - started}
        speed, reading = read_all(cache, seed=0)
        figures |= speed | {"memory growth while reading, MB": growth(reading)}
        print(json.dumps(figures), flush=True)
        if image is not None:
            plot(image, reading, [])
        config = TrainConfig()
        no_text = batch_maker(
            cache, lambda said: torch.zeros(len(said), 1), config, NoiseSchedule(config.schedule)
        )
        figures["latents per second of one core, noise included"] = batches_with_noise(no_text)
        training: Memory = []
        if steps > 1:
            more, training = train(cache, steps, room)
            figures |= more | {"memory growth while training, MB": growth(training)}
            if image is not None:
                plot(image, reading, training)
    return figures, reading, training


@command
def main() -> None:
    """Measure, plot, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=120, help="training steps; 0 trains nothing")
    parser.add_argument("--context-megabytes", type=int, default=32, help="for states of texts")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--plot", type=Path, default=Path("runs/loader-memory.png"))
    parser.add_argument("--output", type=Path, default=Path("runs/loader.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    figures, _, _ = measure(
        arguments.count,
        arguments.steps,
        arguments.folder,
        arguments.plot,
        arguments.context_megabytes,
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    sys.exit(main())
