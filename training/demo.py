"""See it work: the embedded model draws, learns a little more, and draws the same again.

    python training/demo.py [--output FOLDER] [--from-scratch] [section.key=value ...]

Trains with train_latent.py and training/configs/demo.yaml, then asks the model for several subjects
in several styles and grounds, and writes them as one PNG grid; before.png shows the model before.
With --from-scratch a small U-Net starts from random weights (demo_from_scratch.yaml).
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.atomic import atomic_file
from latentdiff.errors import command

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "configs" / "demo.yaml"
FROM_SCRATCH = HERE / "configs" / "demo_from_scratch.yaml"
SUBJECTS = ("cat", "fox", "owl", "octopus", "strawberry", "hamburger", "rocket", "castle")
PROMPTS = (
    "a {}",
    "a painting of a {}",
    "a pencil sketch of a {}",
    "pixel art of a {}",
    "a {} on a blue background",
    "pixel art of a {} on a yellow background",
)


def free_folder(wanted: Path) -> Path:
    """The folder itself, or the first of FOLDER-2, FOLDER-3 … that is not there yet."""
    folder, number = wanted, 2
    while folder.exists():
        folder = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return folder


def prompts() -> list[str]:
    """One row per subject, one column per style or ground."""
    texts = [prompt.format(subject) for subject in SUBJECTS for prompt in PROMPTS]
    return [
        text.replace(" a owl", " an owl").replace(" a octopus", " an octopus") for text in texts
    ]


def draw(model: Path | None, target: Path) -> None:
    """Generate the grid with a trained model, or with the embedded one."""
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.pipelines.pictures import grid

    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    images = pipeline(prompts(), seed=0).images
    large = [image.resize((128, 128), 0) for image in images]
    with atomic_file(target) as new:
        grid(large, columns=len(PROMPTS)).save(new)


def train(words: Sequence[str]) -> int:
    """Run train_latent.py with these words. Returns: its exit code."""
    # Ctrl-C reaches the training too; it writes its checkpoint and says so, and is waited for.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        script = [sys.executable, str(HERE / "train_latent.py")]
        return subprocess.run([*script, *words], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Train, draw, say where everything is; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    options = parser.parse_intermixed_args(arguments)
    started = time.monotonic()
    folder = free_folder(options.output)
    config = FROM_SCRATCH if options.from_scratch else CONFIG
    if code := train(["--config", str(config), f"output={folder}", *options.overrides]):
        return code
    picture = folder / "grid.png"
    draw(folder / "model", picture)
    if not options.from_scratch:
        draw(None, folder / "before.png")
    print(f"rows: {', '.join(SUBJECTS)}")
    print(f"columns: {', '.join(p.format('…') for p in PROMPTS)}")
    if not options.from_scratch:
        print(f"before the training: {(folder / 'before.png').resolve()}")
    print(f"{time.monotonic() - started:.0f} s after the start, pictures: {picture.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
