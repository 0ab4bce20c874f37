"""Peak memory of a few training steps: LoRA against training all weights.

    python benchmarks/lora_memory.py [--channels 128,256,512]

Of the embedded model's U-Net, or of one with Stable Diffusion 1.x's blocks and these channels. Each
kind runs in a process of its own; what is counted is the most that was resident beyond the process
with all libraries and the model in it. Needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys

KINDS = ("lora", "full")
STEPS = 3


def measure(kind: str, channels: list[int], batch: int, size: int) -> dict[str, float]:
    """Train for some steps in this process."""
    import peft  # noqa: F401  (in both kinds, so that its libraries do not count)
    import torch

    from latentdiff.embedded import EMBEDDED_MODEL
    from latentdiff.finetune.full import FullConfig
    from latentdiff.finetune.lora import LoraConfig
    from latentdiff.finetune.registry import make_method
    from latentdiff.formats.folder import load_components
    from latentdiff.models.unet import UNet
    from latentdiff.models.unet_config import UNetConfig
    from latentdiff.train.ema import Ema
    from latentdiff.train.optimizer import OptimizerConfig, make_optimizer

    components = load_components(EMBEDDED_MODEL)
    if channels:
        middle = len(channels) - 1
        config = UNetConfig(
            block_out_channels=tuple(channels),
            down_block_types=(*["CrossAttnDownBlock2D"] * middle, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * middle),
            cross_attention_dim=components.text_encoder.width,
        )
        components = dataclasses.replace(components, unet=UNet(config))
    unet = components.unet
    start = resident()
    method = make_method(components, LoraConfig() if kind == "lora" else FullConfig())
    optimizer = make_optimizer(unet, OptimizerConfig())
    ema = Ema(unet, 0.999)
    x = torch.randn(batch, unet.config.in_channels, size, size)
    context = torch.randn(batch, 77, components.text_encoder.width)
    for step in range(STEPS):
        unet(x, 500, context).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)
    trained = sum(p.numel() for p in method.trained().values())
    everything = sum(p.numel() for p in unet.parameters())
    return {"trained": trained, "all": everything, "weights": everything * 4 / 2**20} | {
        "peak": resident("VmHWM") - start
    }


def resident(line: str = "VmRSS") -> float:
    """Memory of this process in MB: now (VmRSS), or at most since its start (VmHWM)."""
    with open("/proc/self/status", encoding="utf-8") as file:
        found = next(text for text in file if text.startswith(f"{line}:"))
    return int(found.split()[1]) / 1024


def main() -> None:
    """Measure each kind in its own process and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", default="", metavar="N,N,…")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=16, help="of the latents")
    parser.add_argument("--kind", choices=KINDS, help="in this process, as JSON")
    options = parser.parse_args()
    channels = [int(n) for n in options.channels.split(",") if n]
    if options.kind:
        print(json.dumps(measure(options.kind, channels, options.batch, options.size)))
        return
    for kind in KINDS:
        command = [sys.executable, *sys.argv, "--kind", kind]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = json.loads(told.splitlines()[-1])
        print(
            f"{kind}: {row['trained']:,} of {row['all']:,} parameters trained "
            f"({row['trained'] / row['all']:.2%}); {row['peak']:.0f} MB beyond the loaded model, "
            f"whose weights are {row['weights']:.0f} MB"
        )


if __name__ == "__main__":
    main()
