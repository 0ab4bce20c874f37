"""Examine a data set before training on it; nothing in it is changed.

    latentdiff doctor DATASET [--output DIR] [--quarantine KINDS] [data.key=value ...]

DATASET is a folder or .zip of captioned images, a .parquet file or a folder of them, or a folder
of the `datasets` library; what else opening it needs is given as for training
(data.caption_column=NAME), or by --config with the YAML file of a training run. It writes

    report.html        tables, and images of what was found
    quarantine.jsonl   what training leaves out, with data.quarantine=DIR/quarantine.jsonl
    findings.jsonl     everything found, one line each
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.config import load_config
from latentdiff.data.source import DataConfig, guess_kind
from latentdiff.doctor.examine import LIST, NAMED, REPORT, Result, examine
from latentdiff.doctor.findings import (
    DEFAULT_QUARANTINE,
    KINDS,
    QUARANTINABLE,
    Order,
    check_kinds,
)
from latentdiff.doctor.records import open_counter
from latentdiff.errors import UserError, command, printable
from latentdiff.files import free_folder
from latentdiff.plain_yaml import read_yaml, to_inline


@dataclass(frozen=True)
class _Only:
    """The part of a training configuration that is of interest here."""

    data: DataConfig = field(default_factory=DataConfig)
    """The captioned images."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("latentdiff doctor", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("dataset", metavar="DATASET", help="folder, .zip, .parquet or datasets folder")
    add("overrides", nargs="*", metavar="data.key=value", help="as for train_latent.py")
    add("--config", type=Path, help="YAML file of a training; its data section is taken")
    add("--output", type=Path, metavar="DIR", help="default: runs/doctor-NAME, or -2, -3 …")
    default = ",".join(DEFAULT_QUARANTINE)
    kinds = f"of {', '.join(QUARANTINABLE)}; `none` for an empty list; default: {default}"
    add("--quarantine", default=default, metavar="KINDS", help=f"what goes on the list, {kinds}")
    add("--tiny", type=int, metavar="PIXELS", help="shorter side; default: half of data.image_size")
    bits = "bits of 128 that look-alikes differ in at most; -1: do not look; default: %(default)s"
    add("--similar", type=int, default=6, metavar="BITS", help=bits)
    add("--text-encoder", metavar="DIR", help="model folder or `embedded` whose tokenizer counts")
    add("--max-tokens", type=int, metavar="N", help="default: the text encoder's, else 77")
    add("--threads", type=int, default=min(8, os.cpu_count() or 1), help="default: %(default)s")
    add("--show", type=int, default=40, metavar="N", help="images of each kind; %(default)s")
    return parser.parse_intermixed_args(arguments)


def read_order(args: argparse.Namespace) -> Order:
    """Check the command line as a whole. Raises: UserError."""
    data = read_data(args.dataset, args.config, args.overrides)
    for name, least in (("threads", 1), ("show", 0), ("max_tokens", 3)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
    words = [word.strip() for word in args.quarantine.split(",") if word.strip()]
    kinds = () if words in ([], ["none"]) else check_kinds(words)
    tiny = data.image_size // 2 if args.tiny is None else args.tiny
    return Order(
        data,
        tiny,
        args.similar,
        open_counter(args.text_encoder, args.max_tokens),
        kinds,
        args.output or free_folder(Path("runs") / f"doctor-{_stem(args.dataset)}"),
        args.threads,
        args.show,
    )


def read_data(dataset: str, config: Path | None, overrides: Sequence[str]) -> DataConfig:
    """Put DATASET over a file's data section, and overrides over both. Raises: UserError."""
    given: Any = (read_yaml(config).get("data") or {}) if config else {}
    if not isinstance(given, dict):
        raise UserError(f"{config}: data must hold `key: value` lines; got {given!r:.80}.")
    own = {"path": dataset, "kind": guess_kind(dataset)}
    # As overrides, so that mistakes in the file are reported in the same words as in training.
    taken = [f"data.{key}={to_inline(value)}" for key, value in (given | own).items()]
    return load_config(_Only, None, [*taken, *overrides]).data


def summary(order: Order, result: Result) -> str:
    """What is printed at the end."""
    lines = [
        f"{result.images} images with captions, {result.readable} can be read "
        f"({result.seconds:.1f} s; captions {order.counter.words})"
    ]
    for kind, count in result.counts.items():
        if count:
            names = ", ".join(map(printable, result.names[kind])) + " …" * (count > NAMED)
            lines.append(f"{count:>9}  {KINDS[kind].title} ({KINDS[kind].severity}): {names}")
    lines += [
        "",
        f"report      {order.output / REPORT}",
        f"quarantine  {result.quarantined} images; train without them: "
        f"data.quarantine={order.output / LIST}",
        "No file of the data set was changed.",
    ]
    return "\n".join(lines)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the exit code is 0 when all was looked at, whatever was found."""
    order = read_order(parse(arguments))
    print(summary(order, examine(order)))


def _stem(dataset: str) -> str:
    return Path(dataset).expanduser().resolve().stem or "data"
