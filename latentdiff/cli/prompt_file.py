"""Prompt files: what to draw, one row after another, each with settings of its own.

    a cat painting                                            .txt: a line is a prompt,
    --prompt "a, b" --negative_prompt "y" --seed 5            or options, as A1111 has them
    {"prompt": "a cat", "steps": 30, "size": "64x128"}        .jsonl: an object a line
    prompt,seed,guidance                                      .csv: columns, with a header

Fields have the names of the pipeline's arguments, of generate's options, or A1111's. A row without
a field, or with an empty one, has what the command line says for all.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from latentdiff.cli.generate import image_size
from latentdiff.data.captions import csv_rows, read_lines
from latentdiff.errors import UserError, choice_error
from latentdiff.pipelines.inputs import (
    check_counts,
    check_pixels,
    check_seed,
    guidance_scales,
)

#: The fields and their types; `size` is put into height and width.
FIELDS: dict[str, type] = {
    **dict.fromkeys(("prompt", "negative_prompt", "size", "sampler", "timestep_spacing"), str),
    **dict.fromkeys(("seed", "height", "width", "num_inference_steps"), int),
    "num_images_per_prompt": int,
    "guidance_scale": float,
}
#: generate's names and A1111's.
_OTHERWISE = {
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "sampler_name": "sampler",
    "spacing": "timestep_spacing",
    "num_images": "num_images_per_prompt",
}
#: Lines that are named; so many more are counted.
_SHOWN = 10


class Row(NamedTuple):
    """One row of a prompt file: the number of its line, and options of the pipeline."""

    line: int
    options: dict[str, Any]


def read_prompt_file(file: Path) -> list[Row]:
    """The rows of a file.

    Raises: UserError: it cannot be read or has no row; or every line that is wrong, by its number.
    """
    lines: Iterable[tuple[int, Any]] = enumerate(read_lines(file), start=1)
    parse: Callable[[Any], Mapping[str, Any]] = _line
    if file.suffix.lower() == ".csv":
        lines = csv_rows("\n".join(read_lines(file)), str(file), "prompt")
        lines, parse = ((n, row) for n, row in lines if any(row.values())), dict
    elif file.suffix.lower() == ".jsonl":
        parse = _json_object
    rows, problems = list[Row](), dict[int, str]()
    for number, line in lines:
        if not isinstance(line, str) or line.strip():
            with noted(problems, number):
                rows.append(Row(number, _options(parse(line))))
    check_lines(file, problems)
    if not rows:
        raise UserError(f"{file} holds no prompt.")
    return rows


@contextmanager
def noted(problems: dict[int, str], line: int) -> Iterator[None]:
    """Note a UserError as the problem of a line, and go on."""
    try:
        yield
    except UserError as error:
        problems.setdefault(line, str(error))


def check_lines(file: Path, problems: Mapping[int, str]) -> None:
    """Raises: UserError: some line has a problem."""
    if problems:
        shown = [f"{file}, line {n}: {why}" for n, why in [*problems.items()][:_SHOWN]]
        more = len(problems) - len(shown)
        raise UserError("\n".join(shown) + f"\nand {more} more lines" * (more > 0))


def _line(line: str) -> dict[str, str]:
    """{"prompt": "a, b", "seed": "5"} of `--prompt "a, b" --seed 5`, or a prompt."""
    if not line.strip().startswith("--"):
        return {"prompt": line.strip()}
    try:
        words = shlex.split(line)
    except ValueError:
        raise UserError(
            'a quote is not closed; a quote of the text itself is written \\".'
        ) from None
    found = dict[str, list[str]]()
    for word in words:
        if word.startswith("--"):
            values = found.setdefault(word.removeprefix("--"), [])
        else:
            values.append(word)
    return {name: " ".join(values) for name, values in found.items()}


def _json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error}).") from error
    if not isinstance(row, dict):
        raise UserError(f'it must be like {{"prompt": "a cat"}}; got {line.strip():.80}')
    return row


def _options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row's fields, checked as far as they can be without a model. Raises: UserError."""
    options: dict[str, Any] = {}
    for given, value in fields.items():
        name = given.strip().lower().replace("-", "_").replace(" ", "_")
        name = _OTHERWISE.get(name, name)
        if name not in FIELDS:
            raise choice_error("a field", given, [*FIELDS, *_OTHERWISE])
        if name in options:
            raise UserError(f"{given!r} is given twice.")
        if value is not None and value != "":
            options[name] = _value(name, value)
    if "prompt" not in options:
        raise UserError("there is no prompt.")
    height, width = image_size(options.pop("size", None), "size")
    options |= {"height": height, "width": width} if height else {}
    check_pixels(options.get("height", 1), options.get("width", 1), "the size")
    counts = ("num_inference_steps", "num_images_per_prompt")
    check_counts(**{name: options[name] for name in counts if name in options})
    if "seed" in options:
        check_seed(options["seed"], options.get("num_images_per_prompt", 1))
    guidance_scales(options.get("guidance_scale", 1), 1)
    return options


def _value(name: str, value: Any) -> Any:
    kind = FIELDS[name]
    if isinstance(value, str) and kind is int and re.fullmatch(r"\s*-?\d{1,30}\s*", value):
        return int(value)
    if isinstance(value, str) and kind is float:
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool):
        words = {str: "text", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{name} must be {words}; got {value!r:.80}.")
    return value
