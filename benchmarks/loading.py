"""How fast and in how much memory a folder of about 1 GB opens, against diffusers.

    python benchmarks/loading.py [--rounds 5] [--folder DIR]

Writes a Stable Diffusion 1.x folder of random float16 weights (a smaller U-Net, the real
autoencoder and text tower) and opens it in turn with both, each in a process of its own that has
imported everything before. Every number of the weights is read once: what is only mapped into
memory would be free otherwise. Prints seconds, peak memory over the weights' size, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OURS, THEIRS = "latentdiff", "diffusers"


def write_folder(folder: Path) -> None:
    """About 1 GB: half of it the U-Net."""
    import torch

    from latentdiff.formats.components import Components, empty_unet
    from latentdiff.formats.diffusers_folder import save_components
    from latentdiff.formats.scheduler_config import read_scheduler
    from latentdiff.formats.sd_facts import sd_configuration
    from latentdiff.models.autoencoder import Autoencoder, empty_autoencoder
    from latentdiff.models.clip_vocabulary import tokenizer_of
    from latentdiff.models.text_encoder import TextEncoder, empty_text_tower
    from latentdiff.models.unet_config import config_from_dict

    config = sd_configuration("1", "eps")
    config["unet"]["block_out_channels"] = [192, 384, 768, 768]
    networks: list[Any] = [
        empty_unet(config_from_dict(config["unet"])),
        empty_autoencoder(config["vae"], "benchmark"),
        empty_text_tower(config["text_encoder"], "benchmark"),
    ]
    numbers = torch.randn(65_521).half() / 50
    for network in networks:
        network.load_state_dict(
            {n: numbers.repeat(-(-t.numel() // len(numbers)))[: t.numel()].reshape(t.shape)
             for n, t in network.state_dict().items()},
            assign=True,
        )  # fmt: skip
    unet, vae, text = networks
    schedule, prediction, sampling = read_scheduler(config["scheduler"])
    tokenizer = tokenizer_of(config["tokenizer"], 77)
    parts = (unet, Autoencoder(vae), TextEncoder(text, tokenizer), schedule, prediction, sampling)
    save_components(folder, Components(*parts), torch.float16)


def open_once(which: str, folder: str) -> None:
    """In a process of its own: open, read every number, print what it took."""
    import time

    import torch

    def resident(what: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    if which == OURS:
        from latentdiff.pipelines.text_to_image import LatentDiffusionPipeline

        def load() -> list[Any]:
            pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
            return [pipe.unet, pipe.autoencoder.module, pipe.text_encoder.module]
    else:
        from diffusers import StableDiffusionPipeline
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: F401
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: F401
        from transformers.models.clip.modeling_clip import CLIPTextModel  # noqa: F401

        def load() -> list[Any]:
            options = {"torch_dtype": torch.float16, "safety_checker": None}
            pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
            return [pipe.unet, pipe.vae, pipe.text_encoder]

    before, start = resident("VmRSS"), time.perf_counter()
    tensors = [t for part in load() for t in part.state_dict().values()]
    opened = time.perf_counter() - start
    for tensor in tensors:
        tensor.sum(dtype=torch.float32)
    read = time.perf_counter() - start
    peak = resident("VmHWM")
    size = sum(tensor.nbytes for tensor in tensors)
    print(json.dumps({"open": opened, "read": read, "memory": (peak - before) / size}))


def measure(which: str, folder: Path) -> dict[str, float]:
    """One process's answer."""
    done = subprocess.run(
        [sys.executable, __file__, "--open", which, "--folder", str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(folder: Path, rounds: int) -> None:
    """Take turns, so that both see the same machine; print medians."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{size / 1e9:.2f} GB in float16, {rounds} rounds each, in turn")
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for which in (OURS, THEIRS) * (rounds + 1):
        found[which].append(measure(which, folder))
    middle = {
        which: {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
        for which, rows in found.items()  # the first round warms the disk's cache
    }
    for which, row in middle.items():
        print(
            f"{which:10}  opened in {row['open']:.2f} s, every number read after "
            f"{row['read']:.2f} s, peak memory {row['memory']:.2f} of the weights in memory"
        )
    ratios = [middle[OURS][key] / middle[THEIRS][key] for key in ("open", "read")]
    print(f"ratio       opened {ratios[0]:.2f}, read {ratios[1]:.2f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a model to open instead of a random one")
    parser.add_argument("--open", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        open_once(args.open, str(args.folder))
        return
    if args.folder:
        compare(args.folder, args.rounds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(temporary) / "model")
        compare(Path(temporary) / "model", args.rounds)


if __name__ == "__main__":
    sys.exit(main())
