"""Measure a model on the embedded data: figures on the screen, as JSON and as a page.

    python inference/evaluate.py [MODEL] [--output runs/evaluation]
    python inference/evaluate.py [MODEL] --likelihood [--output runs/likelihood]

MODEL is a model folder or a Hugging Face id; the default is the embedded model. All prompts and
seeds are fixed, so two models are asked for the same pictures. Needs the `demo` and `eval` extras
and `pip install --no-deps stlpips-pytorch==0.0.2`.

With --likelihood nothing is generated: the evidence lower bound of real pictures in bits per latent
dimension, of seen and of held-out compositions, and a plot of the loss over the timesteps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if importlib.util.find_spec("latentdiff") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from latentdiff.errors import UserError, command
from latentdiff.files import atomic_file, write_text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model", nargs="?", help="folder or Hugging Face id; default: the embedded model")
    add("--output", "-o", type=Path, default=Path("runs/evaluation"), help="default: %(default)s")
    add("--concepts", type=int, default=300, metavar="N", help="default: %(default)s")
    add("--compositions", type=int, default=150, metavar="N", help="of each kind; %(default)s")
    add("--steps", type=int, default=25, help="sampling steps; default: %(default)s")
    add("--guidance", type=float, help="default: the pipeline's")
    add("--batch-size", type=int, default=16, help="default: %(default)s")
    add("--device", help="default: cuda where there is one")
    add("--hub-metrics", action="store_true", help="FID, FD-DINOv2, CMMD; weights must be there")
    add("--likelihood", action="store_true", help="measure the likelihood of real pictures instead")
    add("--pictures", type=int, default=64, metavar="N", help="of each kind; default: %(default)s")
    add("--levels", type=int, default=32, metavar="N", help="per picture; default: %(default)s")
    add("--ode-pictures", type=int, default=8, metavar="N", help="0 = no ODE; %(default)s")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything is loaded. Raises: UserError."""
    for name, least in (
        ("concepts", 12),
        ("compositions", 1),
        ("steps", 1),
        ("batch_size", 1),
        ("pictures", 2),
        ("levels", 1),
        ("ode_pictures", 0),
    ):
        value = getattr(args, name)
        if value < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be at least {least}; got {value}.")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: {args.output} cannot be made ({error.strerror}).") from error


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the figures and the pictures."""
    from latentdiff.embedded import EMBEDDED_MODEL, named
    from latentdiff.evaluation.metrics import Generator
    from latentdiff.evaluation.run import Evaluation, Size, device_words, open_score, rounded
    from latentdiff.files import default_cache
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of

    device = device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model).to(device)
    guidance = pipeline.default_guidance if args.guidance is None else args.guidance
    generator = Generator(pipeline, args.steps, guidance, args.batch_size)
    size = Size(concepts=args.concepts, compositions=args.compositions)

    def say(text: str) -> None:
        print(f"… {text}", file=sys.stderr, flush=True)

    evaluation = Evaluation(pipeline, generator, size, default_cache() / "features", say)
    result = evaluation.run(open_score(Path(named(args.model or EMBEDDED_MODEL))))
    facts = {
        "model": str(args.model or "embedded"),
        "sampler steps": args.steps,
        "guidance": guidance,
        "device": device_words(pipeline.device),
    }
    figures = {**facts, **rounded(result.figures)}
    if args.hub_metrics:
        from latentdiff.evaluation.metrics import hub_metrics

        figures |= rounded(hub_metrics(result.pages["Concepts"], pipeline.device))
    return figures, result.pages


def likelihood(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures and the loss curves, by kind of picture."""
    from latentdiff.evaluation import metrics as measures
    from latentdiff.evaluation import prompts
    from latentdiff.evaluation.likelihood import LikelihoodSize, check_plot, measure
    from latentdiff.evaluation.run import device_words, rounded
    from latentdiff.pipelines.generate import LatentDiffusionPipeline
    from latentdiff.pipelines.inputs import device_of

    check_plot()
    size = LikelihoodSize(args.levels, args.ode_pictures, batch_size=args.batch_size)
    device = device_of(args.device)
    pipeline = LatentDiffusionPipeline.from_pretrained(args.model).to(device)
    drawings, count = prompts.gallery_drawings(), args.pictures
    styles = prompts.held_out_styles(drawings, count - count // 2)
    kinds = {
        "seen": prompts.concept_prompts(drawings, count),
        "held out": styles + prompts.held_out_grounds(drawings, count // 2),
    }
    figures: dict[str, Any] = {
        "model": str(args.model or "embedded"),
        "unit": "bits per latent dimension",
        "levels per picture": args.levels,
        "device": device_words(pipeline.device),
    }
    curves = {}
    for kind, asked in kinds.items():
        print(f"… {len(asked)} pictures, {kind}", file=sys.stderr, flush=True)
        real = measures.real_pictures([a.rendering for a in asked], pipeline.default_size[0])
        found = measure(pipeline, measures.as_tensors(real), [a.prompt for a in asked], size)
        figures |= {f"{kind}: {name}": value for name, value in found.figures.items()}
        curves[kind] = found.curve
    return rounded(figures), curves


def write_likelihood(args: argparse.Namespace, figures: Any, curves: Any) -> None:
    """Print and write what `likelihood` found."""
    from latentdiff.evaluation.likelihood import plot

    for name, value in figures.items():
        print(f"{name:54} {value}")
    file, picture = args.output / "likelihood.json", args.output / "likelihood.png"
    write_text(file, json.dumps({**figures, "loss by timestep": curves}, indent=2) + "\n")
    with atomic_file(picture) as new:
        plot(curves, new, f"Loss of {figures['model']}")
    print(f"\n{file}\n{picture}")


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


if __name__ == "__main__":
    sys.exit(main())
