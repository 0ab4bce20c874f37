"""See it work: the embedded model draws, learns a style, and draws the same again.

    python training/demo.py [--output FOLDER] [section.key=value ...]

Writes FOLDER/before.png (the embedded model's images) and FOLDER/images (24 others in blue and
white), trains a LoRA on them with train_latent.py and training/configs/demo.yaml, and writes
FOLDER/grid.png: the same prompts and seeds before (odd rows) and after (even rows). None of them
asks for a thing in FOLDER/images.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.errors import command
from latentdiff.files import atomic_file, free_folder

if TYPE_CHECKING:
    from PIL.Image import Image

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "configs" / "demo.yaml"
COLUMNS = 8
PROMPTS = (
    *("a cat", "a fox", "a panda", "an octopus", "a butterfly", "a turtle", "a rooster", "a snail"),
    *("a strawberry", "a hamburger", "a mushroom", "a sunflower", "a rocket", "a castle"),
    *("a guitar", "a sailboat"),
)


#: What the LoRA learns from; none of PROMPTS is among them.
CONCEPTS = """
dog face; tiger face; penguin; frog; elephant; red apple; lemon; watermelon; doughnut; bicycle;
birthday cake; house; umbrella; bear; rabbit face; whale; bee; banana; pizza; bus; airplane; key;
clock; tree
"""
#: Black becomes the first colour and white the second, as in a cyanotype.
COLOURS = ("white", "#123a7c")


def draw(prompts: Sequence[str], lora: Path | None = None) -> list[Image]:
    """Generate with the embedded model, and a LoRA file if one is given."""
    from latentdiff import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained()
    if lora is not None:
        pipeline.load_lora(lora)
    return pipeline(list(prompts), seed=0).images


def make_images(folder: Path) -> None:
    """Write captioned images in a style of their own: the model's, in two colours."""
    from PIL import ImageOps

    folder.mkdir()
    names = [" ".join(name.split()) for name in CONCEPTS.split(";")]
    prompts = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    for prompt, image in zip(prompts, draw(prompts), strict=True):
        file = folder / f"{prompt.replace(' ', '_')}.png"
        ImageOps.colorize(image.convert("L"), *COLOURS).save(file)
        file.with_suffix(".txt").write_text(prompt, encoding="utf-8")


def save(rows: Sequence[Sequence[Image]], target: Path) -> None:
    """Write the first COLUMNS of each row below one another, then the next ones."""
    from latentdiff.images import grid

    parts = range(0, len(PROMPTS), COLUMNS)
    images = [image for at in parts for row in rows for image in row[at : at + COLUMNS]]
    with atomic_file(target) as new:
        grid([image.resize((128, 128), 0) for image in images], COLUMNS).save(new)


def train(words: Sequence[str]) -> int:
    """Run train_latent.py with these words. Returns: its exit code."""
    # Ctrl-C reaches the training too; it is waited for while it writes its checkpoint.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        script = [sys.executable, str(HERE / "train_latent.py")]
        return subprocess.run([*script, *words], check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, train, draw again, say where everything is; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    started = time.monotonic()
    folder = free_folder(options.output)
    first, both, run = folder / "before.png", folder / "grid.png", folder / "run"
    folder.mkdir(parents=True)
    before = draw(PROMPTS)
    save([before], first)
    print(f"before the training: {first.resolve()}", flush=True)
    make_images(folder / "images")
    own = [f"data.path={folder / 'images'}", f"output={run}"]
    if code := train(["--config", str(CONFIG), *own, *options.overrides]):
        return code
    save([before, draw(PROMPTS, run / "lora" / "pytorch_lora_weights.safetensors")], both)
    for at in range(0, len(PROMPTS), COLUMNS):
        print(f"two rows, before and after: {', '.join(PROMPTS[at : at + COLUMNS])}")
    print(f"{time.monotonic() - started:.0f} s after the start, images: {both.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
