"""See it work: the embedded model draws, learns a style from a folder, and draws the same again.

    python training/demo.py [--output FOLDER] [--from-scratch] [section.key=value ...]

Writes FOLDER/before.png (the embedded model's images), FOLDER/images (24 captioned images in blue
and white), trains a LoRA on them with train_latent.py and training/configs/demo.yaml, and writes
FOLDER/grid.png (the same prompts and seeds with it). With --from-scratch a small U-Net is trained
from random weights instead (demo_from_scratch.yaml), and there is no before.png.
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

from latentdiff.errors import command
from latentdiff.files import atomic_file, free_folder

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "configs" / "demo.yaml"
FROM_SCRATCH = HERE / "configs" / "demo_from_scratch.yaml"
#: What the folder shows: half of SUBJECTS (cat, fox, octopus, hamburger) and twenty others.
CONCEPTS = """
cat; dog face; fox; tiger face; panda; penguin; frog; turtle; elephant; octopus; butterfly;
red apple; lemon; watermelon; hamburger; doughnut; birthday cake; mushroom; sunflower; sailboat;
bicycle; guitar; house; umbrella
"""
#: Black becomes the first colour and white the second, as in a cyanotype.
COLOURS = ("white", "#123a7c")
SUBJECTS = ("cat", "fox", "owl", "octopus", "strawberry", "hamburger", "rocket", "castle")
PROMPTS = (
    "a {}",
    "a painting of a {}",
    "a pencil sketch of a {}",
    "pixel art of a {}",
    "a {} on a blue background",
    "pixel art of a {} on a yellow background",
)


def prompts() -> list[str]:
    """One row per subject, one column per style or ground."""
    texts = [prompt.format(subject) for subject in SUBJECTS for prompt in PROMPTS]
    return [
        text.replace(" a owl", " an owl").replace(" a octopus", " an octopus") for text in texts
    ]


def make_images(folder: Path) -> None:
    """Write what the LoRA learns from: emoji in blue and white, each with its caption in a .txt."""
    from PIL import ImageOps

    from latentdiff.data.emoji import EmojiSource
    from latentdiff.data.source import DataConfig

    concepts = tuple(" ".join(name.split()) for name in CONCEPTS.split(";"))
    source = EmojiSource.from_config(DataConfig(emoji_concepts=concepts, emoji_variants=1))
    folder.mkdir(parents=True)
    for index in range(len(source)):
        file = folder / f"{source.group(index).replace(' ', '_')}.png"
        ImageOps.colorize(source[index].image.convert("L"), *COLOURS).save(file)
        caption = source.captions(index)[1]  # "a cat"; the first is "cat"
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")


def draw(target: Path, model: Path | None = None, lora: Path | None = None) -> None:
    """Generate the grid with a trained model, or with the embedded one and a LoRA file."""
    from latentdiff import LatentDiffusionPipeline
    from latentdiff.images import grid

    pipeline = LatentDiffusionPipeline.from_pretrained(model)
    if lora is not None:
        pipeline.load_lora(lora)
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
    """Draw, train, draw again, say where everything is; see `errors.command` for exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--from-scratch", action="store_true", help="begin with random weights")
    options = parser.parse_intermixed_args(arguments)
    started = time.monotonic()
    folder = free_folder(options.output)
    run, grid, config, words = folder / "run", folder / "grid.png", FROM_SCRATCH, []
    if not options.from_scratch:
        images, before, config = folder / "images", folder / "before.png", CONFIG
        make_images(images)
        draw(before)
        print(f"before the training: {before.resolve()}", flush=True)
        words = [f"data.path={images}"]
    if code := train(["--config", str(config), f"output={run}", *words, *options.overrides]):
        return code
    if options.from_scratch:
        draw(grid, model=run / "model")
    else:
        draw(grid, lora=run / "lora" / "pytorch_lora_weights.safetensors")
    print(f"rows: {', '.join(SUBJECTS)}")
    print(f"columns: {', '.join(p.format('…') for p in PROMPTS)}")
    print(f"{time.monotonic() - started:.0f} s after the start, images: {grid.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
