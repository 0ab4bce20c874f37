"""From nothing to the first image: `latentdiff generate` against diffusers on the same folder.

    python benchmarks/cold_start.py [--model FOLDER] [--repeats 5] [--output FILE.json]

Each run is a fresh process; the two take turns, so that a slow moment hits both. Same prompt, 25
steps, same guidance, fp32, image written as PNG. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.embedded import EMBEDDED_MODEL

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "a cat painting"
DIFFUSERS = """
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe(sys.argv[2], num_inference_steps=25, guidance_scale=5.0).images[0].save(sys.argv[3])
"""
#: Runs a command and prints its peak memory in KiB.
MEASURE = """
import os, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run(command: list[str]) -> tuple[float, float]:
    """Return (seconds, peak MB) of a command. Raises: CalledProcessError: it failed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command],
        check=True, capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    return time.perf_counter() - began, int(done.stdout) * 1024 / 1e6


def further(model: Path) -> float:
    """Seconds of one more image by a loaded pipeline; the middle of five."""
    from latentdiff import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    found = []
    for seed in range(6):
        began = time.perf_counter()
        pipeline(PROMPT, seed=seed, progress=False)
        found.append(time.perf_counter() - began)
    return median(found[1:])


def measure(model: Path, repeats: int) -> dict[str, Any]:
    """Return every figure by name."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            target = f"{folder}/{number}"
            script = ["inference/generate.py", PROMPT, "--model", str(model), "--quiet"]
            ours.append(run([sys.executable, *script, "--output", f"{target}-ours.png"]))
            arguments = [str(model), PROMPT, f"{target}-theirs.png"]
            theirs.append(run([sys.executable, "-c", DIFFUSERS, *arguments]))
    first, peer = median(s for s, _ in ours), median(s for s, _ in theirs)
    return {
        "first image, s": round(first, 2),
        "diffusers, s": round(peer, 2),
        "ours / diffusers": round(first / peer, 3),
        "a further image, s": round(further(model), 2),
        "peak memory, MB": round(max(m for _, m in ours)),
        "peak memory of diffusers, MB": round(max(m for _, m in theirs)),
    }


def main() -> None:
    """Print the figures, and write them when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    figures = measure(arguments.model.resolve(), arguments.repeats)
    for name, value in figures.items():
        print(f"{name:30} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
