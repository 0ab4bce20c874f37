"""One process of a small training in float64, for tests that launch several of them.

    python tests/sharded_worker.py FOLDER '{"steps": 20, "batch": 2, "accumulation": 2, ...}'

It goes on from a checkpoint that is there, and writes FOLDER/rank-R.json (what this process held
and did), FOLDER/exported.safetensors (the averaged weights) and FOLDER/ema (power averages). With
"dies at" the second process kills itself at that event (see killing.py), unless the launcher has
started it again; then it comes "late" by so many seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from killing import Fate, arm  # noqa: E402

from latentdiff.models.unet import UNet  # noqa: E402
from latentdiff.models.unet_config import UNetConfig  # noqa: E402
from latentdiff.train.batches import BatchShape, Order  # noqa: E402
from latentdiff.train.checkpoint import TrainingState  # noqa: E402
from latentdiff.train.distributed import (  # noqa: E402
    gather_state,
    is_sharded,
    local,
    prepare,
    start_processes,
)
from latentdiff.train.ema import Ema, PowerEmaConfig, PowerEmas, averages  # noqa: E402
from latentdiff.train.log import Tracker, read_metrics  # noqa: E402
from latentdiff.train.loop import (  # noqa: E402
    LoopConfig,
    OptimizerStep,
    training_loop,
)
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from latentdiff.train.rendezvous import was_restarted  # noqa: E402

IMAGES = 7
SHAPE = UNetConfig(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    norm_num_groups=8,
    cross_attention_dim=12,
)


def held_bytes(tensors: Any) -> tuple[int, int]:
    """Bytes that this process has, and bytes in all."""
    pairs = [(local(t).nbytes, t.numel() * t.element_size()) for t in tensors if t.ndim]
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)


def sample_image(row: int, sample: int) -> Tensor:
    """Noisy latents of an image for a sample, in float64."""
    known = torch.Generator().manual_seed(row)
    noise = torch.Generator().manual_seed(10_000 + sample)
    made = torch.randn(4, 8, 8, generator=known) + torch.randn(4, 8, 8, generator=noise)
    return made.double()


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train; returns what is written to rank-R.json too."""
    if was_restarted() and os.environ["RANK"] == "1":
        time.sleep(settings.get("late", 0))  # so the other finds what the dead one left behind
    accelerator = start_processes("no", cpu=True, shards=True)
    if "dies at" in settings and accelerator.process_index == 1 and not was_restarted():
        arm(Fate(settings["dies at"]))
    torch.manual_seed(0)
    unet = UNet(SHAPE).double()
    optimizer = make_optimizer(unet, OptimizerConfig(lr=3e-3))
    model, prepared = prepare(accelerator, unet, optimizer)
    ema, writes = Ema(unet, 0.9), accelerator.is_main_process
    powers = PowerEmas(unet, PowerEmaConfig(every=10, dtype="float32"), folder, writes)
    shape = BatchShape(
        settings["batch"],
        settings["accumulation"],
        accelerator.num_processes,
        accelerator.process_index,
    )
    config = LoopConfig(
        max_steps=settings["steps"],
        checkpoint_every=4,
        keep_every=8,
        log_every=4,
        tensorboard=False,
    )
    facts = {"images per step": shape.total}
    state = TrainingState(
        {"unet": unet},
        {"unet": optimizer},
        accelerator,
        folder / "checkpoints",
        1,
        config.keep_every,
        facts,
        averages(ema, powers),
    )
    first, seconds = state.resume()
    order, samples = Order(range(IMAGES), seed=5), list[list[int]]()

    def make_batch(step: int, micro: int) -> tuple[Tensor, Tensor]:
        chosen = shape.samples(step, micro)
        found = order(chosen)
        samples.extend([step, n, row] for n, row in zip(chosen, found, strict=True))
        clean = torch.stack([sample_image(row, 0) for row in found])
        return clean, torch.stack(
            [sample_image(row, n) for n, row in zip(chosen, found, strict=True)]
        )

    folder.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(folder, first, config, accelerator.is_main_process)
    accumulation = settings["accumulation"]
    optimizer_step = OptimizerStep(
        accelerator, model, prepared, lambda step: 3e-3, 0.05, accumulation
    )
    loop = training_loop(
        optimizer_step, make_batch, shape, config, tracker, state.save, first, seconds
    )
    context = torch.linspace(-1, 1, 3 * 12, dtype=torch.float64).view(1, 3, 12)
    for step, (clean, noisy) in loop:
        t = torch.full((len(clean),), 100.0 + step.number)
        predicted = model(noisy, t, context.expand(len(clean), -1, -1))
        step.backward((predicted - clean).square().mean())
        if step.update():
            ema.update(step.number)
            powers.update(step.number)
    tracker.close()
    moments = [m for s in optimizer.state.values() for k, m in s.items() if k != "step"]
    found = {
        "processes": accelerator.num_processes,
        "sharded": is_sharded(unet),
        "first step": first,
        "weights": held_bytes(p for p in unet.parameters()),
        "moments": held_bytes(moments),
        "average": held_bytes(ema.average.values()),
        "power averages": held_bytes(a for track in powers.tracks for a in track.average.values()),
        "samples": sorted(samples),
    }
    with ema.applied():
        exported = gather_state(unet)
        if accelerator.is_main_process:
            from safetensors.torch import save_file

            whole = {k: v.contiguous() for k, v in exported.items()}
            save_file(whole, folder / "exported.safetensors")
    rank = accelerator.process_index
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return found


def losses(folder: Path) -> dict[int, float]:
    """Loss of every step."""
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl")}


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
