"""The fixed prompt sets of the evaluation, drawn from the embedded data by a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from latentdiff.data.emoji import Drawing, Rendering, is_held_out, list_drawings
from latentdiff.data.emoji_captions import unit_hash, with_article
from latentdiff.data.styles import BACKGROUNDS, STYLES


class Asked(NamedTuple):
    """One prompt, and the picture that it asks for."""

    prompt: str
    rendering: Rendering
    row: int
    """The concept's place in the gallery."""


def gallery_drawings() -> list[Drawing]:
    """One drawing for every concept that is not a flag; the one without skin tone where it is."""
    first: dict[str, Drawing] = {}
    for drawing in sorted(list_drawings(flags=False), key=lambda d: (d.concept, len(d.tones))):
        first.setdefault(drawing.concept, drawing)
    return list(first.values())


def prompt_for(rendering: Rendering) -> str:
    """Ask for a rendering in plain words."""
    words = with_article(rendering.drawing.concept)
    if rendering.style != "plain":
        style = rendering.style
        words = f"{style if style == 'pixel art' else with_article(style)} of {words}"
    if rendering.background != "white":
        words += f" on {with_article(rendering.background)} background"
    return words


def _chosen(drawings: Sequence[Drawing], rendering: Sequence[Rendering], count: int) -> list[Asked]:
    rows = {drawing.concept: row for row, drawing in enumerate(drawings)}
    order = sorted(
        rendering,
        key=lambda r: unit_hash("evaluation", r.drawing.concept, r.style, r.background),
    )
    return [Asked(prompt_for(r), r, rows[r.drawing.concept]) for r in order[:count]]


def concept_prompts(drawings: Sequence[Drawing], count: int) -> list[Asked]:
    """Plain pictures on white of `count` concepts."""
    return _chosen(drawings, [Rendering(d, "plain", "white") for d in drawings], count)


def held_out_styles(drawings: Sequence[Drawing], count: int) -> list[Asked]:
    """(concept, style) pairs that training never saw, on white."""
    pairs = [
        Rendering(d, style, "white")
        for d in drawings
        for style in STYLES
        if style != "plain" and is_held_out(d.concept, style, "white")
    ]
    return _chosen(drawings, pairs, count)


def held_out_grounds(drawings: Sequence[Drawing], count: int) -> list[Asked]:
    """(concept, background) pairs that training never saw, in the plain style."""
    pairs = [
        Rendering(d, "plain", ground)
        for d in drawings
        for ground in BACKGROUNDS
        if ground != "white" and is_held_out(d.concept, "plain", ground)
    ]
    return _chosen(drawings, pairs, count)
