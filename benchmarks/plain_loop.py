"""The plain loop that the project's training is compared with.

    python benchmarks/plain_loop.py --config training/configs/from_scratch.yaml [a.b=value ...]

Same U-Net, latents, captions, batch and number of steps as train_latent.py with that file, but the
choices of diffusers' text-to-image example at its defaults: noise prediction, uniform t, plain
squared error, AdamW at a constant 1e-4 after 500 steps of warm-up, no caption dropout, its EMA
(decay 0.9999), Stable Diffusion's schedule. --lr sets another rate. Writes OUTPUT/model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from latentdiff.diffusion.objective import ObjectiveConfig
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import command
from latentdiff.formats.folder import save_components
from latentdiff.precision import has_fast_bf16
from latentdiff.train.batches import BatchMaker, ContextCache, Order
from latentdiff.train.config import read_config
from latentdiff.train.parts import load_parts, open_latents, prepare_unet
from latentdiff.train.run import batch_shape

#: train_text_to_image.py at its defaults.
WARMUP, CLIP_NORM, EMA_DECAY = 500, 1.0, 0.9999
REPORT_EVERY = 100


def train(config_file: Path, overrides: list[str], rate: float) -> Path:
    """Run the loop. Returns: the model folder."""
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    parts, config, _ = load_parts(read_config(config_file, overrides))
    latents = open_latents(config, parts.autoencoder, accelerator)
    unet = prepare_unet(parts, config, accelerator)
    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, weight_decay=1e-2, fused=True)
    ema = EMAModel(unet.parameters(), decay=EMA_DECAY)
    make_batch = BatchMaker(
        latents.data,
        Order(latents.train, config.loop.seed),
        batch_shape(config, accelerator, before=None)[0],
        ContextCache(parts.text_encoder.encode),
        ObjectiveConfig(condition_dropout=0.0),
        NoiseSchedule(ScheduleConfig()),
        torch.device("cpu"),
    )
    began, losses = time.monotonic(), []
    for step in range(config.loop.max_steps):
        batch = make_batch(step, 0)
        x_0 = parts.autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        noise = torch.randn_like(x_0)
        t = torch.randint(0, scheduler.config["num_train_timesteps"], (len(x_0),))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16("cpu")):
            predicted = unet(scheduler.add_noise(x_0, noise, t), t, batch.context)
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        losses.append(float(loss))
        if (step + 1) % REPORT_EVERY == 0:
            mean = sum(losses[-REPORT_EVERY:]) / REPORT_EVERY
            print(f"step {step + 1}  {time.monotonic() - began:.0f} s  loss {mean:.4f}", flush=True)
    ema.copy_to(unet.parameters())
    parts.schedule, parts.prediction = ScheduleConfig(), "eps"
    folder = Path(config.output) / "model"
    save_components(folder, parts, torch.float16)
    return folder


@command
def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    print(train(arguments.config, arguments.overrides, arguments.lr))


if __name__ == "__main__":
    sys.exit(main())
