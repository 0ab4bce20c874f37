"""Named pieces of prompts from a styles.csv with A1111's columns: name, prompt, negative_prompt.

A style's text goes around the prompt where it holds {prompt}, and after it, with a comma, where it
does not; several styles act one after another, each on what the ones before it have made.

Source: AUTOMATIC1111's stable-diffusion-webui, modules/styles.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latentdiff.data.captions import csv_rows, read_text
from latentdiff.errors import UserError, choice_error


class Style(NamedTuple):
    """One row; empty texts change nothing."""

    prompt: str
    negative: str


def read_styles(file: str | Path) -> dict[str, Style]:
    """The styles of a file by name.

    Raises: UserError: it cannot be read, or lacks a column.
    """
    file = Path(file).expanduser()
    styles = {}
    for line, row in csv_rows(read_text(file), str(file), "negative_prompt"):
        if not {"name", "prompt"} <= row.keys():
            raise UserError(
                f"{file} must have the columns name, prompt and negative_prompt; it has "
                f"{', '.join(row)}."
            )
        name = (row["name"] or "").strip()
        if not name or name in styles:
            raise UserError(f"{file}, line {line}: a style needs a name of its own; got {name!r}.")
        styles[name] = Style(row["prompt"] or "", row.get("negative_prompt") or "")
    return styles


def styled(
    styles: Mapping[str, Style], names: Sequence[str], prompt: str, negative: str
) -> tuple[str, str]:
    """A prompt and its negative prompt with styles. Raises: UserError: there is no such style."""
    for name in names:
        if name not in styles:
            raise choice_error("style", name, styles)
        prompt = _around(styles[name].prompt, prompt)
        negative = _around(styles[name].negative, negative)
    return prompt, negative


def _around(style: str, prompt: str) -> str:
    if "{prompt}" in style:
        return style.replace("{prompt}", prompt)
    return ", ".join(filter(None, (prompt.strip(), style.strip())))
