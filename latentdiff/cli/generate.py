"""Generate images from prompts.

    latentdiff generate "a cat painting" --output cat.png
    latentdiff generate "a red apple" "a blue fish" --num-images 4 --output grid.png

Several images go into one grid, or with --separate into numbered files beside --output. The files
say how they were made; --replay makes such a file's image, or grid, again. --prompts makes many
images, each in a file of its own; started again, only those that are missing:

    latentdiff generate --replay cat.png --output again.png
    latentdiff generate --prompts prompts.csv --output many/cat.png
    accelerate launch -m latentdiff generate --prompts prompts.csv --output many/cat.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, command, warn
from latentdiff.images import check_image_file, save_image
from latentdiff.pipelines.inputs import check_pixels
from latentdiff.pipelines.styles import read_styles, styled

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.task import PipelineOutput

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
    add("prompts", nargs="*", metavar="PROMPT", help="what to draw")
    add(
        "--prompts",
        type=Path,
        dest="prompt_file",
        metavar="FILE",
        help="a .txt, .jsonl or .csv file of prompts, each with settings of its own",
    )
    add("--batch-size", type=int, metavar="N", help="with --prompts: at once; default: 16")
    add("--contact-sheet", type=Path, metavar="FILE", help="with --prompts: all images, small")
    add_options(parser)
    add("--size", metavar="N or HxW", help="pixels, up to 4096x4096; default: as trained")
    add("--hires-scale", type=float, metavar="X", help="then enlarge, and draw from there again")
    add("--hires-strength", type=float, metavar="X", help="0 ... 1; default: 0.7")
    args = parser.parse_args(argv)
    if bool(args.prompt_file) == bool(args.prompts or args.replay):
        parser.error("give a PROMPT, or a file with --prompts, or an image with --replay")
    for option in ("batch_size", "contact_sheet"):
        if getattr(args, option) is not None and not args.prompt_file:
            parser.error(f"--{option.replace('_', '-')} belongs to --prompts")
    if args.preview and args.prompt_file:
        parser.error("--preview does not go with --prompts")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every task has."""
    add = parser.add_argument
    add(
        "--replay",
        type=Path,
        metavar="FILE",
        help="make that file's image again; other options replace what it says",
    )
    add("--output", "-o", type=Path, default=Path("image.png"), help="default: %(default)s")
    add("--model", help="folder, single file or Hugging Face id; default: the embedded model")
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="which weights, where there are several: fp16, non_ema")
    add(
        "--prediction",
        choices=("eps", "v"),
        help="what the U-Net predicts; default: as the model says",
    )
    add("--vae", metavar="NAME", help="another autoencoder: a folder, file or Hugging Face id")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")
    add(
        "--lora-dir", metavar="DIR", help="where <lora:name:0.7> of a prompt finds name.safetensors"
    )
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
    add("--clip-skip", type=int, metavar="N", help="text encoder layers to leave out; A1111's - 1")
    add("--steps", type=int, help="sampling steps; default: 25")
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
    add("--num-images", type=int, metavar="N", help="per prompt; default: 1")
    add(
        "--columns",
        type=int,
        metavar="N",
        help="columns of the grid; default: --num-images, or square",
    )
    add("--separate", action="store_true", help="numbered files instead of a grid")
    add("--preview", type=Path, metavar="FILE", help="how it looks so far, after every step")
    add("--safety-checker", metavar="NAME", help="folder or Hugging Face id; says what it flags")
    add("--low-memory", action="store_true", help="slower; the images stay the same")
    add("--device", help="cpu, cuda, cuda:1, mps; default: cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32")
    add("--quiet", action="store_true", help="no progress bar")


def image_size(text: str | None, option: str = "--size") -> tuple[int | None, int | None]:
    """(height, width) from "64" or "64x128". Raises: UserError: anything else, or too many."""
    if text is None:
        return None, None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"{option} must be like 64 or 64x128 (height x width); got {text!r:.40}.")
    height, width = int(parts[0]), int(parts[-1])
    check_pixels(height, width, option)
    return height, width


def numbers(option: str, text: str | None) -> list[float] | None:
    """[3.0, 7.5] from "3,7.5"; whole numbers stay whole. Raises: UserError: anything else."""
    if text is None:
        return None
    try:
        return [int(part) if part.strip().isdecimal() else float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} must be numbers with commas between; got {text!r}.") from None


def opened(args: argparse.Namespace, recorded: Mapping[str, Any]) -> LatentDiffusionPipeline:
    """The pipeline that the options name, else the settings of an image."""
    import torch

    from latentdiff.formats.embedding import embedding_and_token
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of
    from latentdiff.pipelines.lora import lora_and_weight

    model = {} if args.model else recorded.get("model", {})
    pipeline = LatentDiffusionPipeline.from_pretrained(
        args.model or model.get("source"),
        dtype=getattr(torch, args.dtype or recorded.get("dtype", "float32")),
        revision=args.revision or model.get("revision"),
        variant=args.variant or model.get("variant"),
        prediction=args.prediction or model.get("prediction"),
        vae=args.vae or model.get("vae"),
    )
    loras = [lora_and_weight(text) for text in args.lora]
    for file, weight in loras or files_of(recorded.get("loras", ()), "weight"):
        pipeline.load_lora(file, weight)
    words = [embedding_and_token(text) for text in args.embedding]
    for file, token in words or files_of(recorded.get("embeddings", ()), "token"):
        print(f"word: {pipeline.load_embedding(file, token)}", file=sys.stderr)
    try:
        device = device_of(args.device or recorded.get("device"))
    except UserError:
        if args.device:
            raise
        device = device_of(None)
    pipeline.to(device)
    if args.low_memory:
        pipeline.enable_vae_slicing()
        pipeline.enable_vae_tiling()
        if device.type != "cpu":
            pipeline.enable_model_cpu_offload(device)
    if args.safety_checker:
        pipeline.load_safety_checker(args.safety_checker)
    return pipeline


def files_of(recorded: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, Any]]:
    """(file, what is recorded by that name) of adapters; of those without a file a warning."""
    for one in recorded:
        if "file" not in one:
            lora, weight = one.get("name"), one.get("weight")
            warn(f"the image had a LoRA {lora}; --lora FILE:{weight} would give it.")
    return [(one["file"], one.get(name)) for one in recorded if "file" in one]


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's options, of those that were given."""
    height, width = image_size(args.size)
    prompts, negatives = args.prompts, args.negative
    if args.style and not args.prompt_file:
        if args.replay and not prompts:
            raise UserError("--style beside --replay needs a PROMPT, which it goes around.")
        styles = read_styles(args.styles)
        both = [styled(styles, args.style, prompt, negatives or "") for prompt in prompts or [""]]
        prompts, negatives = map(list, zip(*both, strict=True))
    options = {
        "prompt": prompts or None,
        "negative_prompt": negatives,
        "prompt_syntax": "a1111" if args.weighted else "long" if args.long else None,
        "height": height,
        "width": width,
        "clip_skip": args.clip_skip,
        "hires_scale": args.hires_scale,
        "hires_strength": args.hires_strength,
        "num_inference_steps": args.steps,
        "guidance_scale": numbers("--guidance", args.guidance),
        "guidance_interval": numbers("--guidance-interval", args.guidance_interval),
        "num_images_per_prompt": args.num_images,
        "sampler": args.sampler,
        "timestep_spacing": args.spacing,
        "timesteps": numbers("--timesteps", args.timesteps),
        "seed": args.seed,
        "wildcards": args.wildcards,
        "lora_dir": args.lora_dir,
    }
    return {name: value for name, value in options.items() if value is not None}


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written. Raises: UserError."""
    if args.columns is not None and args.columns < 1:
        raise UserError(f"--columns must be at least 1; got {args.columns}.")
    check_image_file(args.output, "--output")
    if args.preview is not None:
        check_image_file(args.preview, "--preview")


def watching(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a call by which its progress is seen."""
    shown: dict[str, Any] = {"progress": not args.quiet}
    if args.preview is None:
        return shown
    from latentdiff.images import grid

    def show(pipeline: Any, step: int, timestep: float, given: Mapping[str, Any]) -> None:
        save_image(grid(pipeline.preview(given["denoised"])), args.preview)

    names = ["denoised"]
    return shown | {"callback_on_step_end": show, "callback_on_step_end_tensor_inputs": names}


def say_flagged(output: PipelineOutput) -> None:
    """Say which images the safety checker flags, by their seeds."""
    flagged = [s for s, flag in zip(output.seeds, output.flagged or (), strict=False) if flag]
    if flagged:
        print(
            f"flagged by the safety checker: seed {', '.join(map(str, flagged))}", file=sys.stderr
        )


def replayed(
    args: argparse.Namespace, given: Mapping[str, Any]
) -> tuple[PipelineOutput, int | None]:
    """The images of --replay, with given options and arguments instead of those recorded, and the
    columns of their grid; says how like the file's they are."""
    if args.output.resolve() == args.replay.resolve():
        raise UserError(f"--output must not be the file of --replay itself, {args.replay}.")
    from latentdiff.pipelines.replay import Replay

    replay = Replay.of(args.replay)
    pipeline = opened(args, replay.settings)
    with replay.threads(given):
        output = replay.run(pipeline, given, **watching(args))
    print(replay.verdict(output, given), file=sys.stderr)
    return output, args.columns or replay.settings.get("columns")


def save(output: PipelineOutput, args: argparse.Namespace, columns: int | None) -> list[Path]:
    """Write one file, or numbered ones; returns their paths."""
    if args.separate or len(output.images) == 1:
        return output.save(args.output)
    from latentdiff.images import grid
    from latentdiff.pipelines.metadata import of_grid, write

    image, settings = grid(output.images, columns), of_grid(output.settings, columns)
    return [write(image, args.output, settings)]


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    args = parse(arguments)
    image_size(args.size)
    check_outputs(args)
    if args.prompt_file:
        from latentdiff.cli.bulk import generate_all

        print(generate_all(args))
        return
    options = given(args)
    if args.replay:
        output, columns = replayed(args, options)
    else:
        output, columns = opened(args, {})(**options, **watching(args)), args.columns
    say_flagged(output)
    if args.long or args.weighted or args.wildcards:
        for read in output.prompts:
            print(f"{read.text[:40]!r}: {read}", file=sys.stderr)
    if columns is None and (args.num_images or 1) > 1:
        columns = args.num_images
    paths, seeds = save(output, args, columns), output.seeds
    seen = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    print(f"seed {seen}", file=sys.stderr)
    for path in paths:
        print(path)
