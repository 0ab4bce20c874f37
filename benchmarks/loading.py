"""How fast and in how much memory a folder of about 1 GB opens, against diffusers.

    python benchmarks/loading.py [--rounds 5] [--folder DIR]

Writes a Stable Diffusion 1.x folder of random float16 weights (a smaller U-Net, the real
autoencoder and text tower) and opens it with both in turn, in one process that has imported
everything before; the first round of each is not counted. Every number of the weights is read once:
what is only mapped into memory would be free otherwise. Prints the medians of seconds on the clock
and of seconds of this process's CPU, which other work on the machine does not change, the peak
memory over the weights' size, and the ratios.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OURS, THEIRS = "latentdiff", "diffusers"


def write_folder(folder: Path) -> None:
    """About 1 GB: more than half of it the U-Net."""
    from latentdiff.formats.folder import Components, empty_unet, save_components
    from latentdiff.formats.scheduler import read_scheduler
    from latentdiff.formats.sd_facts import sd_configuration
    from latentdiff.models.autoencoder import Autoencoder, empty_autoencoder
    from latentdiff.models.clip_text import TextEncoder, empty_text_tower
    from latentdiff.models.tokenizer import tokenizer_of
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


def load_ours(folder: str) -> list[Any]:
    """The networks, opened here."""
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    return [pipe.unet, pipe.autoencoder.module, pipe.text_encoder.module]


def load_theirs(folder: str) -> list[Any]:
    """The networks, opened by diffusers."""
    from diffusers import StableDiffusionPipeline

    options = {"torch_dtype": torch.float16, "safety_checker": None}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    return [pipe.unet, pipe.vae, pipe.text_encoder]


def resident(what: str) -> int:
    """Bytes of this process in RAM, mapped files included: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def measure(load: Callable[[str], list[Any]], folder: Path) -> dict[str, float]:
    """Open once and read every number."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before, clock, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    networks = load(str(folder))
    opened, opened_cpu = time.perf_counter() - clock, time.process_time() - cpu
    tensors = [tensor for network in networks for tensor in network.state_dict().values()]
    for tensor in tensors:
        tensor.view(torch.uint8).flatten()[::64].sum()  # one byte of every cache line
    return {
        "opened, s": opened,
        "opened, CPU s": opened_cpu,
        "opened and read, s": time.perf_counter() - clock,
        "opened and read, CPU s": time.process_time() - cpu,
        "peak memory / weights": (resident("VmHWM") - before) / sum(t.nbytes for t in tensors),
    }


def compare(folder: Path, rounds: int) -> None:
    """Take turns, so that both see the same machine; print medians."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    found: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for _ in range(rounds + 1):
        for name, load in ((OURS, load_ours), (THEIRS, load_theirs)):
            found[name].append(measure(load, folder))
    print(f"{size / 1e9:.2f} GB in float16, {rounds} rounds each, in turn; medians")
    print(f"{'':24}{OURS:>12}{THEIRS:>12}{'ratio':>8}")
    for key in found[OURS][0]:
        ours, theirs = (statistics.median(r[key] for r in found[n][1:]) for n in (OURS, THEIRS))
        print(f"{key:24}{ours:12.3f}{theirs:12.3f}{ours / theirs:8.2f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="a model to open instead of a random one")
    args = parser.parse_args()
    disable_progress_bars()
    if args.folder:
        compare(args.folder, args.rounds)
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_folder(Path(temporary) / "model")
        compare(Path(temporary) / "model", args.rounds)


def disable_progress_bars() -> None:
    """Drawing them would count against the others."""
    import diffusers.utils.logging as theirs
    import transformers.utils.logging as text

    for logging in (theirs, text):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


if __name__ == "__main__":
    main()
