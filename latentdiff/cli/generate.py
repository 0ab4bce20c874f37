"""Generate images from prompts.

    latentdiff generate "a cat painting" --output cat.png
    latentdiff generate "a red apple" "a blue fish" --num-images 4 --output grid.png

Several images go into one grid, or with --separate into numbered files beside --output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError, command
from latentdiff.images import check_image_file, save_image
from latentdiff.pipelines.inputs import check_pixels
from latentdiff.pipelines.styles import read_styles, styled

if TYPE_CHECKING:
    from PIL.Image import Image


#: Without importing them: --help is instant. A test compares this with SAMPLERS.
SAMPLER_NAMES = (
    *("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde"),
    *("dpmpp_2s_ancestral", "unipc", "lms", "pndm", "lcm"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; nothing heavy is imported yet, so --help is instant."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "latentdiff generate", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    add("--output", "-o", type=Path, default=Path("image.png"), help="default: %(default)s")
    add("--model", help="folder, single file or Hugging Face id; default: the embedded model")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="which weights, where there are several: fp16, non_ema")
    add(
        "--prediction",
        choices=("eps", "v"),
        help="what the U-Net predicts; default: as the model says",
    )
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")
    add("--negative", metavar="TEXT", help="what to steer away from")
    add("--style", action="append", default=[], metavar="NAME", help="may be repeated")
    add("--styles", type=Path, default=Path("styles.csv"), metavar="FILE", help="%(default)s")
    add("--wildcards", metavar="DIR", help="draw __name__ from DIR/name.txt, and {a|b}")
    add("--embedding", action="append", default=[], metavar="FILE[=TOKEN]", help="may be repeated")
    syntax = parser.add_mutually_exclusive_group().add_argument
    syntax(
        "--long", action="store_true", help="take prompts of any length, which are cut otherwise"
    )
    syntax("--weighted", action="store_true", help="any length, with (red:1.3), [red] and BREAK")
    add("--steps", type=int, default=25, help="sampling steps; default: %(default)s")
    add("--guidance", help="up to 1 = off; one, or one per prompt: 3,7; default: the model's, or 5")
    add("--guidance-interval", metavar="LOW,HIGH", help="guide only at these timesteps")
    add("--sampler", metavar="NAME", help=f"{', '.join(SAMPLER_NAMES)}; default: the model's")
    add("--spacing", metavar="NAME", help="spacing of the steps: leading, trailing, karras, …")
    add(
        "--timesteps",
        metavar="T,T,…",
        help="the timesteps themselves, decreasing, in place of --steps",
    )
    add("--seed", type=int, help="seed of the first image; default: random, printed")
    add("--num-images", type=int, default=1, metavar="N", help="per prompt; default: %(default)s")
    add("--size", metavar="N or HxW", help="pixels, up to 4096x4096; default: as trained")
    add(
        "--columns",
        type=int,
        metavar="N",
        help="columns of the grid; default: --num-images, or square",
    )
    add("--separate", action="store_true", help="numbered files instead of a grid")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def image_size(text: str | None) -> tuple[int | None, int | None]:
    """(height, width) from "64" or "64x128". Raises: UserError: anything else, or too many."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--size must be like 64 or 64x128 (height x width); got {text!r:.40}.")
    height, width = int(parts[0]), int(parts[-1])
    check_pixels(height, width, "--size")
    return height, width


def numbers(option: str, text: str | None) -> list[float] | None:
    """[3.0, 7.5] from "3,7.5"; whole numbers stay whole. Raises: UserError: anything else."""
    if text is None:
        return None
    try:
        return [int(part) if part.strip().isdecimal() else float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} must be numbers with commas between; got {text!r}.") from None


def embedding_and_token(text: str) -> tuple[str, str | None]:
    """("cat.pt", "<my-cat>") from "cat.pt=<my-cat>"; the token may be left out."""
    file, sign, token = text.rpartition("=")
    return (file, token) if sign and not Path(text).exists() else (text, None)


def styled_prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts with --style. Raises: UserError."""
    styles = read_styles(args.styles) if args.style else {}
    both = [styled(styles, args.style, text, args.negative or "") for text in args.prompts]
    return [text for text, _ in both], [negative for _, negative in both]


def generate(args: argparse.Namespace) -> tuple[list[Image], list[int]]:
    """The images and their seeds, prompt by prompt."""
    import torch

    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of
    from latentdiff.pipelines.lora import lora_and_weight

    prompts, negatives = styled_prompts(args)
    dtype, device = getattr(torch, args.dtype), device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(
        args.model,
        dtype=dtype,
        revision=args.revision,
        variant=args.variant,
        prediction=args.prediction,
    )
    for text in args.lora:
        pipeline.load_lora(*lora_and_weight(text))
    height, width = image_size(args.size)
    for text in args.embedding:
        name = pipeline.load_embedding(*embedding_and_token(text))
        print(f"word: {name}", file=sys.stderr)
    result = pipeline.to(device)(
        prompts,
        negative_prompt=negatives,
        prompt_syntax="a1111" if args.weighted else "long" if args.long else "plain",
        height=height,
        width=width,
        num_inference_steps=args.steps,
        guidance_scale=numbers("--guidance", args.guidance),
        guidance_interval=numbers("--guidance-interval", args.guidance_interval),
        num_images_per_prompt=args.num_images,
        sampler=args.sampler,
        timestep_spacing=args.spacing,
        timesteps=numbers("--timesteps", args.timesteps),
        seed=args.seed,
        wildcards=args.wildcards,
        progress=not args.quiet,
    )
    if args.long or args.weighted or args.wildcards:
        for read in result.prompts:
            print(f"{read.text[:40]!r}: {read}", file=sys.stderr)
    return result.images, result.seeds


def save(images: list[Image], args: argparse.Namespace) -> list[Path]:
    """Write one file, or numbered ones; returns their paths."""
    if args.separate and len(images) > 1:
        name = args.output.with_suffix("").name
        paths = [
            args.output.with_name(f"{name}-{k:03d}{args.output.suffix}") for k in range(len(images))
        ]
    else:
        from latentdiff.images import grid

        columns = args.columns
        if columns is None and args.num_images > 1:
            columns = args.num_images
        images, paths = [grid(images, columns)], [args.output]
    return [save_image(image, path) for image, path in zip(images, paths, strict=True)]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    args = parse(arguments)
    image_size(args.size)
    if args.columns is not None and args.columns < 1:
        raise UserError(f"--columns must be at least 1; got {args.columns}.")
    check_image_file(args.output, "--output")
    images, seeds = generate(args)
    paths = save(images, args)
    seen = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    print(f"seed {seen}", file=sys.stderr)
    for path in paths:
        print(path)
