"""Edit images.

    latentdiff edit inpaint cat.png "a cat with a hat" --mask hat.png --mask-blur 4 --output new.png
    latentdiff edit outpaint cat.png "a cat in a garden" --left 32 --right 32
    latentdiff edit image_to_image sketch.jpg "a cat painting" --strength 0.6 --num-images 4
    latentdiff edit interpolate "a cat" "a dog" --frames 16 --output morph.gif
    latentdiff edit upscale small.png --scale 4 --output large.png
    latentdiff edit --replay new.png --output again.png
    latentdiff edit TASK --help

The image keeps its size. Options and files are those of `latentdiff generate`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latentdiff.cli import generate
from latentdiff.errors import command
from latentdiff.images import save_animation

Option = tuple[str, dict[str, Any]]


class Task(NamedTuple):
    """A word of the command line."""

    about: str
    options: tuple[Option, ...]
    """Names and what argparse is told; `dest` is the argument of the pipeline's method."""
    takes_image: bool = True


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _option(name: str, kind: Any, help: str, **more: Any) -> Option:
    return name, {"type": kind, "help": help, **more}


_STRENGTH = _option("--strength", float, "0 keeps the image … 1 begins from pure noise")
_BLUR = _option("--mask-blur", int, "pixels by which the mask is widened and softened; default: 0")
#: What `restore` takes off → the option that measures it.
KINDS = {"denoise": "noise", "deblur": "blur", "jpeg": "quality"}
#: The pipeline's method → what the shell says of it.
TASKS: dict[str, Task] = {
    "image_to_image": Task("draw an image anew from its noised self", (_STRENGTH,)),
    "inpaint": Task(
        "paint a part of an image anew; the rest stays to the bit",
        (
            _option(
                "--mask",
                str,
                "image that is white where to paint; default: where the image is transparent",
                dest="mask_image",
                metavar="IMAGE",
            ),
            _STRENGTH,
            _BLUR,
            _option(
                "--padding-mask-crop",
                int,
                "work on the masked area alone, with so many pixels around it, at the model's size",
                metavar="N",
            ),
        ),
    ),
    "outpaint": Task(
        "paint beyond the edges, and where the image is transparent",
        (
            *(
                _option(f"--{side}", int, "pixels to add there", metavar="N")
                for side in ("left", "right", "top", "bottom")
            ),
            _STRENGTH,
            _BLUR,
        ),
    ),
    "variations": Task("draw images like it, four by default", (_STRENGTH,)),
    "colorize": Task("give a grey image colours; its lightness stays", (_STRENGTH,)),
    "restore": Task(
        "take noise, blur or the traces of JPEG from an image",
        (
            _option("--kind", str, "default: that of the options below", choices=list(KINDS)),
            _option("--noise", float, "its deviation, of colours in 0 … 1; default: 0.1"),
            _option("--blur", float, "its deviation in pixels; default: 1.5"),
            _option("--quality", int, "1 … 100, of the JPEG; default: 30"),
            _STRENGTH,
        ),
    ),
    "upscale": Task(
        "enlarge an image, inventing what agrees with it",
        (_option("--scale", float, "above 1; default: 2"), _STRENGTH),
    ),
    "interpolate": Task(
        "frames from one prompt or seed to the next: a strip, or a GIF if --output ends in .gif",
        (
            _option("--frames", int, "how many; default: 16"),
            _option("--seeds", whole_numbers, "to pass through", dest="seed", metavar="N,N,…"),
            _option(
                "--size", str, "pixels, up to 4096x4096; default: as trained", metavar="N or HxW"
            ),
        ),
        takes_image=False,
    ),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; nothing heavy is imported yet, so --help is instant."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("latentdiff edit", description=__doc__, formatter_class=form)
    words = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, task in TASKS.items():
        own = words.add_parser(name, help=task.about, description=f"{task.about}.")
        own.set_defaults(size=None, image=None, hires_scale=None, hires_strength=None)
        own.set_defaults(prompt_file=None)
        if task.takes_image:
            own.add_argument("image", nargs="?", metavar="IMAGE", help="any image file")
        own.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to draw")
        for flag, told in task.options:
            own.add_argument(flag, **told)
        generate.add_options(own)
        own.set_defaults(output=Path("edited.png"))
    args = parser.parse_args(argv)
    if not args.replay:
        if TASKS[args.task].takes_image and args.image is None:
            parser.error(f"give an IMAGE: latentdiff edit {args.task} IMAGE, or --replay FILE")
        if not TASKS[args.task].takes_image and not args.prompts:
            parser.error(f"give a PROMPT: latentdiff edit {args.task} PROMPT, or --replay FILE")
    _check_words(parser, args)
    return args


def _check_words(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is not meant as it stands, and find the kind of restoring from its measure."""
    first = args.prompts[0] if args.prompts else ""
    if args.task == "upscale" and first.replace(".", "", 1).isdecimal():
        parser.error(f"{first} is taken for the prompt; the scale is --scale {first}")
    if args.task != "restore":
        return
    if first in KINDS:
        parser.error(f"{first} is taken for the prompt; the kind is --kind {first}")
    given = [kind for kind, measure in KINDS.items() if getattr(args, measure) is not None]
    if not args.replay and args.kind is None and len(given) == 1:
        args.kind = given[0]
    if others := [kind for kind in given if args.kind not in (None, kind)]:
        parser.error(f"--{KINDS[others[0]]} is for --kind {others[0]}, not {args.kind}")


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the pipeline's method, of those that were given."""
    names = [
        told.get("dest", flag.lstrip("-").replace("-", "_"))
        for flag, told in TASKS[args.task].options
        if flag != "--size"
    ]
    own = {name: getattr(args, name) for name in ["image", *names]}
    found = {name: value for name, value in own.items() if value is not None}
    return {**({} if args.replay else {"prompt": ""}), **generate.given(args), **found}


def check_files(arguments: dict[str, Any]) -> None:
    """Read the images that are given, before a model is loaded. Raises: UserError."""
    from latentdiff.pipelines.image_inputs import read_images

    for name in ("image", "mask_image"):
        if name in arguments:
            read_images(arguments[name], name)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `errors.command` for exit codes."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    replay = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    replay.add_argument("--replay", type=Path, nargs="?")
    file = None if words[:1] and words[0] in TASKS else replay.parse_known_args(words)[0].replay
    if file is not None:
        from latentdiff.pipelines.replay import Replay

        task = Replay.of(file).settings["task"]
        if task not in TASKS:
            return generate.main(words)
        words.insert(0, task)
    args = parse(words)
    generate.check_outputs(args)
    given = arguments_of(args)
    check_files(given)
    columns = args.columns
    if args.replay:
        output, columns = generate.replayed(args, given)
    else:
        pipeline = generate.opened(args, {})
        output = getattr(pipeline, args.task)(**given, **generate.watching(args))
    generate.say_flagged(output)
    if args.task == "interpolate" and args.output.suffix.lower() == ".gif":
        paths = [save_animation(output.images, args.output)]
    else:
        row = len(output.images) if args.task == "interpolate" else args.num_images
        paths = generate.save(output, args, columns or row)
    print(f"seed {output.seeds[0]}, {output.steps} steps", file=sys.stderr)
    for path in paths:
        print(path)
    return 0
