"""Measure a model beside captioned images: figures on the screen, as JSON and as a page.

    latentdiff evaluate [MODEL] [--reference FOLDER] [--asks FILE] [--output runs/evaluation]
    latentdiff evaluate [MODEL] --likelihood [--output runs/likelihood]

MODEL is a model folder or a Hugging Face id; the default is the embedded model. The prompts are the
first captions of the reference's images, examples/twemoji by default; which are taken and the seeds
are fixed, so two models are asked for the same images. Needs the `eval` extra and
`pip install --no-deps stlpips-pytorch==0.0.2`.

A file of --asks has prompts to take instead, and what their images must show: see
evaluation/asks.py.

With --likelihood nothing is generated: the evidence lower bound of the reference's images in bits
per latent dimension, and a plot of the loss over the timesteps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.data.source import EXAMPLE, DataConfig, guess_kind
from latentdiff.errors import UserError, command
from latentdiff.files import atomic_file, write_text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "latentdiff evaluate", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hugging Face id; default: the embedded model")
    add("--output", "-o", type=Path, default=Path("runs/evaluation"), help="default: %(default)s")
    add("--reference", metavar="DATASET", help="folder, .zip or .parquet of captioned images")
    add("--asks", type=Path, metavar="FILE", help="other prompts, and what they must show")
    add("--concepts", type=int, default=300, metavar="N", help="at most; default: %(default)s")
    add("--steps", type=int, default=25, help="sampling steps; default: %(default)s")
    add("--guidance", type=float, help="default: the pipeline's")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--device", help="default: cuda where there is one")
    add("--hub-metrics", action="store_true", help="FID, FD-DINOv2, CMMD; weights must be there")
    add("--likelihood", action="store_true", help="measure the likelihood of real images instead")
    add(
        "--images",
        "--pictures",
        type=int,
        default=64,
        metavar="N",
        help="at most; default: %(default)s",
    )
    add("--levels", type=int, default=32, metavar="N", help="per image; default: %(default)s")
    add(
        "--ode-images",
        "--ode-pictures",
        type=int,
        default=8,
        metavar="N",
        help="0 = no ODE; %(default)s",
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded. Raises: UserError."""
    for name, least in (
        ("concepts", 2),
        ("steps", 1),
        ("batch_size", 1),
        ("images", 2),
        ("levels", 1),
        ("ode_images", 0),
    ):
        value = getattr(args, name)
        if value < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be at least {least}; got {value}.")
    if args.hub_metrics and args.asks:
        raise UserError(
            "--hub-metrics compares images of the reference's prompts; leave out --asks."
        )
    if args.reference is None and not EXAMPLE.is_dir():
        raise UserError(
            f"--reference is required: {EXAMPLE}, which is taken without it, is not there. Give a "
            "folder of captioned images."
        )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {args.output} cannot be made ({error.strerror}).") from error


def reference_of(args: argparse.Namespace, count: int, pipeline: Any) -> Any:
    """Read the images that the model is compared with."""
    from latentdiff.evaluation.reference import open_reference

    given = args.reference
    try:
        data = DataConfig() if given is None else DataConfig(kind=guess_kind(given), path=given)
        return open_reference(data, count, pipeline.default_size[0])
    except UserError as error:
        raise UserError(str(error).replace("data.path", "--reference")) from error


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the figures and the images."""
    from latentdiff.embedded import EMBEDDED_MODEL, named
    from latentdiff.evaluation.asks import measure_asks, read_asks
    from latentdiff.evaluation.metrics import Generator
    from latentdiff.evaluation.run import device_words, measure, open_score, rounded
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of

    device = device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model).to(device)
    reference = reference_of(args, sys.maxsize if args.asks else args.concepts, pipeline)
    guidance = pipeline.default_guidance if args.guidance is None else args.guidance
    generator = Generator(pipeline, args.steps, guidance, args.batch_size)

    def say(text: str) -> None:
        print(f"… {text}", file=sys.stderr, flush=True)

    if args.asks:
        asks = read_asks(args.asks, reference)
        result = measure_asks(asks, args.asks.parent, reference, generator, say)
    else:
        score = open_score(Path(named(args.model or EMBEDDED_MODEL)))
        result = measure(pipeline, generator, reference, score, say)
    facts = {
        "model": str(args.model or "embedded"),
        "reference": str(args.reference or EXAMPLE.name),
        "sampler steps": args.steps,
        "guidance": guidance,
        "device": device_words(pipeline.device),
    }
    figures = {**facts, **rounded(result.figures)}
    if args.hub_metrics:
        from latentdiff.evaluation.metrics import hub_metrics

        figures |= rounded(hub_metrics(result.pages["Concepts"], pipeline.device))
    return figures, result.pages


def likelihood(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the figures and the loss curve."""
    from latentdiff.evaluation.likelihood import LikelihoodSize, check_plot, measure
    from latentdiff.evaluation.metrics import as_tensors
    from latentdiff.evaluation.run import device_words, rounded
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of

    check_plot()
    size = LikelihoodSize(args.levels, args.ode_images, batch_size=args.batch_size)
    device = device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model).to(device)
    reference = reference_of(args, args.images, pipeline)
    figures: dict[str, Any] = {
        "model": str(args.model or "embedded"),
        "reference": str(args.reference or EXAMPLE.name),
        "unit": "bits per latent dimension",
        "levels per image": args.levels,
        "device": device_words(pipeline.device),
    }
    print(f"… {len(reference.prompts)} images", file=sys.stderr, flush=True)
    found = measure(pipeline, as_tensors(reference.one_each()), reference.prompts, size)
    return rounded(figures | found.figures), found.curve


def write_likelihood(args: argparse.Namespace, figures: Any, curve: Any) -> None:
    """Print and write what `likelihood` found."""
    from latentdiff.evaluation.likelihood import plot

    for name, value in figures.items():
        print(f"{name:54} {value}")
    file, image = args.output / "likelihood.json", args.output / "likelihood.png"
    write_text(file, json.dumps({**figures, "loss by timestep": curve}, indent=2) + "\n")
    with atomic_file(image) as new:
        plot(curve, new, f"Loss of {figures['model']}")
    print(f"\n{file}\n{image}")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; see `errors.command` for exit codes."""
    args = parse(arguments)
    check(args)
    if args.likelihood:
        return write_likelihood(args, *likelihood(args))
    figures, pages = evaluate(args)
    from latentdiff.html_report import write_html

    for name, value in figures.items():
        print(f"{name:46} {value}")
    write_text(args.output / "figures.json", json.dumps(figures, indent=2) + "\n")
    page, title = args.output / "index.html", f"Evaluation of {figures['model']}"
    write_html(page, "evaluation.html", title=title, facts=figures.items(), sections=pages)
    print(f"\n{args.output / 'figures.json'}\n{page.resolve()}")
