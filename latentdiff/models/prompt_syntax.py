r"""The prompt syntax of AUTOMATIC1111's web UI: how much words count, where a new chunk begins.

    (red)        × 1.1              ((red))     × 1.1²
    (red:1.3)    × 1.3              [red]       ÷ 1.1
    \( \) \[ \] \\                  the sign itself
    BREAK                           what follows begins a new chunk

Factors of nested brackets multiply. Round and square ones are matched apart from each other. One
that is never closed lasts to the end of the text, one that was never opened is just a sign.

Facts: stable-diffusion-webui, modules/prompt_parser.py. BREAK counts within brackets too (there it
becomes a word). What that program does with a text beyond weights (words that change from step to
step, AND, <lora:…>) is refused by name and not taken for words.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from latentdiff.errors import UserError
from latentdiff.models.unknown_words import NETWORK, how_to_load

#: What one pair of brackets multiplies or divides by.
STEP = 1.1
#: Weights of a larger size have no use and overflow in 16 bit.
LARGEST = 100.0

_SIGNS = re.compile(
    r"""\\ (?P<literal> [()\[\]\\:|]? )
    | (?P<open> [(\[] )
    | : \s* (?P<number> [+-]? [.\d]+ ) \s* \)
    | (?P<close> [)\]] )
    | (?P<words> [^\\()\[\]:]+ | : )""",
    re.VERBOSE,
)
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_AT_STEP = re.compile(r":\s*[+-]?[.\d]+\s*$")


class Run(NamedTuple):
    """Words that count equally."""

    text: str
    """As the tokenizer gets it."""
    weight: float
    """1 = as usual."""


def parse(text: str) -> list[list[Run]]:
    """Read a prompt.

    Returns: for each part between BREAKs its runs; neighbours differ in weight, none is empty.
    Raises:  UserError: a weight that is no number or above `LARGEST`; syntax that is not supported.
    """
    _refuse_networks(text)
    pieces: list[str | None] = []  # None is a BREAK
    plain: list[str] = []  # the same without what was escaped, to find unsupported syntax in
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: list[tuple[int, int, float]] = []  # pieces from, to; factor
    for sign in _SIGNS.finditer(text):
        found = sign.lastgroup
        if found == "open":
            opened[sign[0]].append(len(pieces))
        elif found == "number" and opened["("]:
            factors.append((opened["("].pop(), len(pieces), _number(sign["number"])))
        elif sign[0] == ")" and opened["("]:
            factors.append((opened["("].pop(), len(pieces), STEP))
        elif sign[0] == "]" and opened["["]:
            start = opened["["].pop()
            _refuse_schedule("".join(plain[start:]))
            factors.append((start, len(pieces), 1 / STEP))
        elif found == "literal":
            pieces.append(sign["literal"])
            plain.append("")
        else:
            for i, words in enumerate(_BREAK.split(sign[0])):
                new = [words] if i == 0 else [None, words]
                pieces += new
                plain += ["" if piece is None else piece for piece in new]
    factors += [(start, len(pieces), STEP) for start in opened["("]]
    factors += [(start, len(pieces), 1 / STEP) for start in opened["["]]
    return _parts(pieces, _weights(len(pieces), factors))


def escape(text: str) -> str:
    """Text that `parse` reads as exactly these words, each of weight 1 (BREAK excepted)."""
    return re.sub(r"[()\[\]\\:|]", lambda sign: "\\" + sign[0], text)


def _weights(count: int, factors: list[tuple[int, int, float]]) -> list[float]:
    weights = [1.0] * count
    for start, end, factor in factors:
        for i in range(start, end):
            weights[i] *= factor
    return weights


def _parts(pieces: list[str | None], weights: list[float]) -> list[list[Run]]:
    parts: list[list[Run]] = [[]]
    for piece, weight in zip(pieces, weights, strict=True):
        if piece is None:
            parts.append([])
            continue
        if not piece:
            continue
        if not abs(weight) <= LARGEST:
            raise UserError(
                f"the weight of {piece.strip()[:50]!r} in the prompt must lie in -{LARGEST:g} … "
                f"{LARGEST:g} (0.5 to 1.5 usual); got {weight:g}. Use fewer brackets, or write "
                "\\( and \\) for brackets that are part of the text."
            )
        runs = parts[-1]
        if runs and runs[-1].weight == weight:
            runs[-1] = Run(runs[-1].text + piece, weight)
        else:
            runs.append(Run(piece, weight))
    return parts


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    raise UserError(
        f"a weight in the prompt must be a number, as in (red:1.3); got {text!r}. Write \\: for a "
        "colon that is part of the text."
    )


def _refuse_schedule(inside: str) -> None:
    if "|" in inside or _AT_STEP.search(inside):
        raise UserError(
            f"the prompt holds [{inside[:60]}], which changes the words from step to step in "
            "A1111; that is not supported. Take it out, or write \\[ and \\] for brackets that "
            "are part of the text."
        )


def _refuse_networks(text: str) -> None:
    if network := NETWORK.search(text):
        raise UserError(
            f"the prompt holds {network[0][:60]!r}, which loads a file in A1111; a prompt loads "
            f"nothing here. Take it out; {how_to_load(*network.groups())}."
        )
    if re.search(r"\bAND\b", text):
        raise UserError(
            "the prompt holds AND in capitals, which mixes several predictions in A1111; that is "
            "not supported. Write `and` for the word."
        )
