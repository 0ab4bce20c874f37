"""A prompt of any length in pieces that a text tower can take.

A tower with T positions takes T − 2 tokens between its begin and end mark. A longer prompt fills
several such chunks one after the other. Where a comma is among the last tokens of a full chunk,
what follows the comma moves over, so that phrases stay together.

Facts: stable-diffusion-webui, modules/sd_hijack_clip.py (75 tokens, a comma at most 20 back).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from latentdiff.errors import UserError
from latentdiff.models.prompt_syntax import Run

Pieces = Callable[[str], list[tuple[int, ...]]]
"""Text → token ids; those of one learned word, which stay together, in one tuple."""


class Chunk(NamedTuple):
    """What one pass of the tower reads, marks and padding left out."""

    ids: tuple[int, ...]
    """Token ids."""
    weights: tuple[float, ...]
    """How much each counts."""


def comma_reach(room: int) -> int:
    """How many tokens before a chunk's end a comma is looked for: 20 of 75."""
    return room * 20 // 75


def chunks_of(
    parts: Sequence[Sequence[Run]], pieces: Pieces, room: int, comma: int | None
) -> list[Chunk]:
    """Cut a prompt up.

    Args:    parts: what `prompt_syntax.parse` gives.  pieces: the tokenizer.
             room: tokens in a chunk.  comma: the comma's token; None: there is none.
    Returns: at least one chunk; an empty part is an empty chunk, unless it is the last of several.
    Raises:  UserError: a learned word of more vectors than a chunk has room for.
    """
    chunks: list[Chunk] = []
    for part in parts:
        words = [(piece, run.weight) for run in part for piece in pieces(run.text)]
        chunks += _fill(words, room, comma)
    if len(chunks) > 1 and not chunks[-1].ids:
        chunks.pop()
    return chunks


def _fill(
    words: Sequence[tuple[tuple[int, ...], float]], room: int, comma: int | None
) -> list[Chunk]:
    chunks: list[Chunk] = []
    now: list[tuple[int, float]] = []
    after_comma = 0  # in `now`; 0: no comma yet

    def close(end: int) -> None:
        nonlocal now, after_comma
        chunks.append(_chunk(now[:end]))
        now, after_comma = now[end:], 0

    for piece, weight in words:
        if len(piece) > room:
            raise UserError(
                f"a learned word has {len(piece)} vectors, and the text encoder takes {room} "
                "tokens at a time. Use one with fewer vectors."
            )
        is_comma = piece == (comma,)
        if len(now) == room and not is_comma and 0 < room - after_comma < comma_reach(room):
            close(after_comma)
        if len(now) + len(piece) > room:
            close(len(now))
        now += [(token, weight) for token in piece]
        if is_comma:
            after_comma = len(now)
    close(len(now))
    return chunks


def _chunk(tokens: Sequence[tuple[int, float]]) -> Chunk:
    return Chunk(tuple(t for t, _ in tokens), tuple(w for _, w in tokens))
