"""A style from twenty pictures: LoRA on the embedded model.

    python benchmarks/lora_style.py FLUENT_ZIP --output runs/lora_style [--images docs/images]

FLUENT_ZIP holds Microsoft's Fluent emoji in 3D (MIT) as a data set of ours, with metadata.jsonl: 40
of its pictures are used, 20 to train on and 20 to measure with. Prints the held-out loss before and
after, the share that is trained, time and peak memory; with --images the grids before and after are
copied there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "training" / "configs" / "lora.yaml"
NAMES = """
cat face; dog face; tiger face; rabbit face; cow face; pig face; monkey face; mouse face; panda;
koala; bear; polar bear; hamster; frog; wolf; penguin; octopus; turtle; whale; elephant;
lady beetle; honeybee; baby chick; tropical fish; red apple; strawberry; watermelon; lemon;
tangerine; tomato; hamburger; doughnut; mushroom; sunflower; birthday cake; castle;
jack-o-lantern; rabbit; monkey; pig
"""
SHORT = (
    "loop.max_steps=120",
    "loop.checkpoint_every=120",
    "loop.tensorboard=false",
    "validation.every=0",
    "validation.raw=false",
    "validation.samples=100",
    "validation.pictures=12",
    "validation.steps=20",
)
#: Both halves are 20 with this one.
SPLIT_SEED = 14


def pick(archive: Path, folder: Path) -> Path:
    """Unpack the chosen pictures with their names as captions."""
    wanted = {" ".join(name.split()) for name in NAMES.split(";")}
    if folder.exists():
        sys.exit(f"error: {folder} exists, and nothing is overwritten. Choose another --output.")
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive) as files:
        rows = [json.loads(line) for line in files.read("metadata.jsonl").decode().splitlines()]
        chosen = {row["text"]: row["file_name"] for row in rows if row["text"] in wanted}
        if missing := wanted - chosen.keys():
            sys.exit(f"error: {archive} has no picture called {', '.join(sorted(missing))}.")
        lines = []
        for name, file in sorted(chosen.items()):
            target = Path(file).name
            (folder / target).write_bytes(files.read(file))
            lines.append(json.dumps({"file_name": target, "text": name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def train(pictures: Path, output: Path, *more: str) -> tuple[str, float]:
    """Run train_latent.py through `accelerate launch`; return what it printed and its minutes."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "training" / "accelerate" / "single.yaml")]
    command += [str(ROOT / "training" / "train_latent.py"), "--config", str(CONFIG)]
    command += [f"data.path={pictures}", f"output={output}", "data.validation_share=0.5"]
    command += [f"data.split_seed={SPLIT_SEED}", *more]
    print(" ".join(command[1:]), flush=True)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout + done.stderr, (time.perf_counter() - started) / 60


def peak(text: str) -> float:
    """The last peak memory that a run has printed, in MB."""
    return float(re.findall(r"peak memory: (\d+) MB", text)[-1])


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path, metavar="FLUENT_ZIP")
    parser.add_argument("--output", type=Path, default=Path("runs/lora_style"))
    parser.add_argument("--images", type=Path, help="where the grids are copied")
    parser.add_argument("more", nargs="*", metavar="section.key=value", help="for the run")
    options = parser.parse_intermixed_args()
    pictures = pick(options.archive, options.output / "pictures")
    run = options.output / "lora"
    text, minutes = train(pictures, run, *SHORT, *options.more)
    losses = re.findall(r"step (\d+): validation loss ([\d.]+)", text)
    print(*(f"step {step}: held-out loss {loss}" for step, loss in losses), sep="\n")
    print(*re.findall(r"trained: .*", text))
    print(f"{minutes:.1f} minutes; peak memory {peak(text):.0f} MB")
    if options.images:
        grids = sorted((run / "samples").glob("step-????????.png"))
        shutil.copy(grids[0], options.images / "lora-before.png")
        shutil.copy(grids[-1], options.images / "lora-after.png")


if __name__ == "__main__":
    main()
