"""Our training step against the same step as diffusers' text-to-image example does it.

    python benchmarks/train_step.py [--size small|medium|sd15|embedded] [--pairs 20]
                                    [--dtype no|bf16] [--peer-script PATH] [--output FILE.json]

Same U-Net, weights, batch, images on disk, objective (noise prediction, plain squared error) and
number format. Theirs reads, crops and encodes images and captions in each step; ours reads
latents that were encoded once (how long that took is printed) and captions' states from memory.
Blocks of steps alternate, the order within a pair too; each of our blocks begins with an empty
queue, so that nothing is prepared in the peer's time. The figures are medians over the pairs of
(their time / our time) with 95 % bootstrap intervals; above 1 ours is faster:

    end to end ratio   from images on disk to changed weights and average
    step ratio         the part after the encoders: U-Net, loss, backward, clip, AdamW, EMA

--peer-script runs the real train_text_to_image.py for the first of the two (it needs torchvision).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.utils.flop_counter
from accelerate import Accelerator
from peer_step import Peer, PeerFlags, run_script
from step_sizes import SIZES, Size, write_images, write_model

from latentdiff.data.latents import build_latent_cache
from latentdiff.data.source import DataConfig, open_source
from latentdiff.diffusion.objective import ObjectiveConfig, per_sample_loss
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.formats.folder import load_components
from latentdiff.train.batches import (
    BatchMaker,
    BatchShape,
    ContextCache,
    LatentBatch,
    Order,
    Prefetch,
)
from latentdiff.train.ema import Ema
from latentdiff.train.log import count_flops
from latentdiff.train.loop import OptimizerStep
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer
from latentdiff.train.parts import prefers_channels_last

OBJECTIVE = ObjectiveConfig(prediction="eps", weighting="none", condition_dropout=0.0)


class Ours:
    """The parts of train_latent.py, put together as it does."""

    def __init__(self, model: Path, images: Path, size: Size, accelerator: Any) -> None:
        parts, device = load_components(model), accelerator.device
        self.parts, self.schedule = parts, NoiseSchedule(parts.schedule)
        data = DataConfig(kind="folder", path=str(images), image_size=size.resolution)
        source = open_source(data)
        started = time.perf_counter()
        cache = build_latent_cache(
            source, parts.autoencoder, data, images.parent / "cache", 8, device, progress=False
        )
        self.encoding = (time.perf_counter() - started) / len(cache)
        self.flops = count_flops(
            parts.unet, (cache.shape[0] // 2, *cache.shape[1:]), parts.text_encoder.max_length
        )
        self.encoder_flops = encoder_flops(parts.autoencoder, size.resolution)
        unet = parts.unet.to(device).train()
        if prefers_channels_last(None, accelerator):
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        settings = OptimizerConfig(lr=PeerFlags().learning_rate)
        prepared, optimizer = accelerator.prepare(unet, make_optimizer(unet, settings))
        self.ema = Ema(unet, 0.9999)
        self.model = prepared
        self.optimizer_step = OptimizerStep(
            accelerator, prepared, optimizer, lambda step: 1e-4, 1.0, 1
        )
        context = ContextCache(parts.text_encoder.to(device).encode, device)
        shape = BatchShape(size.batch)
        order = Order(range(len(cache)), 0)
        self.make = BatchMaker(cache, order, shape, context, OBJECTIVE, self.schedule, device)
        self._number = 0

    def steps(self, count: int) -> None:
        """Make so many steps from what is on disk; the losses are read at the end, as in a run."""
        keys = ((self._number + n, 0) for n in range(count))
        for number, _, batch in Prefetch(self.make, keys):
            self.unet_step(batch, number)
        self._number += count
        torch.stack([norm for _, _, norm in self.optimizer_step.history]).cpu()
        self.optimizer_step.history = []

    def unet_step(self, batch: LatentBatch, number: int) -> None:
        """The body of train_latent.py."""
        x_0 = self.parts.autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        loss = per_sample_loss(
            self.model, x_0, batch.context, batch.draw, self.schedule, OBJECTIVE
        ).mean()
        self.optimizer_step.backward(loss)
        self.optimizer_step.update(number)
        if self.optimizer_step.accelerator.scaler is not None:
            self.optimizer_step.accelerator.scaler.update()
        self.ema.update(number)

    def unet_steps(self, batch: LatentBatch, count: int) -> None:
        """So many of them on the same batch."""
        for number in range(count):
            self.unet_step(batch, number)


def encoder_flops(autoencoder: Any, resolution: int) -> int:
    """FLOPs of encoding one image."""
    image = torch.zeros(1, 3, resolution, resolution, device=autoencoder.device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        autoencoder.encode_moments(image)
    return int(counter.get_total_flops())


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, with what it left in the GPU's queue."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternate(
    peer: Callable[[], Any], ours: Callable[[], Any], pairs: int, device: torch.device
) -> list[tuple[float, float]]:
    """(their time, our time) of each pair; who goes first changes from pair to pair."""
    found = []
    for number in range(pairs):
        order = (peer, ours) if number % 2 == 0 else (ours, peer)
        times = [seconds(call, device) for call in order]
        found.append((times[number % 2], times[1 - number % 2]))
    return found


def summary(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Median ratio (theirs / ours) with its 95 % bootstrap interval, and the median times."""
    ratios = np.array([theirs / ours for theirs, ours in times])
    drawn = np.random.default_rng(0).integers(0, len(ratios), (10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    theirs, ours = (float(np.median(column)) for column in zip(*times, strict=True))
    return {
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "pairs": len(times),
        "their seconds": theirs,
        "our seconds": ours,
    }


def with_script(
    script: Path, ours: Ours, folders: tuple[Path, Path], size: Size, dtype: str, pairs: int
) -> list[tuple[float, float]]:
    """Pairs in which the peer is the real script, started anew for every five of them."""
    found: list[tuple[float, float]] = []
    device = ours.parts.autoencoder.device
    flags = {
        "resolution": size.resolution,
        "train_batch_size": size.batch,
        "mixed_precision": dtype,
    }
    while len(found) < pairs:
        theirs = run_script(script, *folders, min(5, pairs - len(found)), **flags)
        found += [(t, seconds(partial(ours.steps, 1), device)) for t in theirs]
    return found[:pairs]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build both sides, warm them up, compare."""
    size = SIZES[options.size]
    if options.batch:
        size = dataclasses.replace(size, batch=options.batch)
    model = write_model(size, folder / "model")
    images = write_images(folder / "images", max(64, 4 * size.batch), size.resolution)
    accelerator = Accelerator(mixed_precision=options.dtype, cpu=not torch.cuda.is_available())
    ours = Ours(model, images, size, accelerator)
    peer = Peer(model, images, size.resolution, size.batch, accelerator)
    device, count = accelerator.device, options.steps
    print(
        f"size {options.size}: batch {size.batch} at {size.resolution} px on {device}, dtype "
        f"{options.dtype}; per image U-Net step {ours.flops / 1e9:.1f} GFLOP, VAE encoder "
        f"{ours.encoder_flops / 1e9:.1f} GFLOP; encoding it once took {ours.encoding:.3f} s"
    )
    print(f"peer's flags: {dataclasses.asdict(peer.flags)}", flush=True)
    ours.steps(2)
    for _ in range(2):
        peer.step()
    if options.peer_script:
        times = with_script(
            options.peer_script, ours, (model, images), size, options.dtype, options.pairs
        )
    else:
        times = alternate(
            lambda: [peer.step() for _ in range(count)],
            lambda: ours.steps(count),
            options.pairs,
            device,
        )
    end_to_end = summary(times)
    batch = ours.make(0, 0)
    latents = ours.parts.autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
    inner = alternate(
        lambda: [peer.unet_step(latents, batch.context) for _ in range(count)],
        lambda: ours.unet_steps(batch, count),
        options.pairs,
        device,
    )
    return {
        "size": options.size,
        "batch": size.batch,
        "resolution": size.resolution,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "steps per block": count,
        "U-Net GFLOP per image": ours.flops / 1e9,
        "VAE encoder GFLOP per image": ours.encoder_flops / 1e9,
        "seconds to encode an image once": ours.encoding,
        "peer": str(options.peer_script or "peer_step.py"),
        "peer's flags": dataclasses.asdict(peer.flags),
        "end to end": end_to_end,
        "step": summary(inner),
    }


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, help="images per step; default: the size's own")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="steps per block")
    parser.add_argument("--dtype", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--peer-script", type=Path, metavar="PATH")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    for name, key in (("end to end ratio", "end to end"), ("step ratio", "step")):
        low, high = found[key]["interval"]
        print(
            f"{name} {found[key]['ratio']:.2f}  (95 % {low:.2f} … {high:.2f}, "
            f"{found[key]['pairs']} pairs; theirs {found[key]['their seconds']:.3f} s, ours "
            f"{found[key]['our seconds']:.3f} s)"
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
