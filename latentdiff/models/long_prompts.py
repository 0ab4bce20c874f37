"""Prompts → context, by one of three readings.

    plain    one pass of the text tower; words that do not fit are cut off, with a warning
    long     as many passes as the words need, their states one after the other
    a1111    the same with weighted words and BREAK, see `prompt_syntax`

A text that fits, and for a1111 holds no syntax, has the same states in all three.

A weight w multiplies the states of its tokens, and the chunk is then scaled back to its old mean:

    z'_k = w_k z_k,    z'' = z' · mean(z)/mean(z')

Source: stable-diffusion-webui, modules/sd_emphasis.py (`EmphasisOriginal`), which keeps the mean
because pictures had artifacts without. Were all states of one sign, mean(z')/mean(z) would lie
between the least and the largest weight. Where it does not, the mean is what is left of larger
numbers that cancel (a last LayerNorm without bias), the ratio is noise, and z' stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from latentdiff.errors import UserError, choice_error
from latentdiff.models.prompt_chunks import Chunk, chunks_of
from latentdiff.models.prompt_syntax import Run, parse
from latentdiff.models.text_encoder import TextEncoder

PromptSyntax = Literal["plain", "long", "a1111"]
#: The mean is not scaled up by more than 1 over this.
LEAST_RATIO = 0.01


@dataclass(frozen=True)
class ReadPrompt:
    """What became of a prompt's words."""

    text: str
    """As it was given."""
    chunks: tuple[Chunk, ...]
    """What each pass of the text tower reads."""
    room: int
    """Tokens that fit into a pass."""
    left_out: str = ""
    """Words that no pass reads: of a plain prompt that is too long."""

    @property
    def tokens(self) -> int:
        """Tokens that are read, marks left out."""
        return sum(len(chunk.ids) for chunk in self.chunks)

    def __str__(self) -> str:
        passes = "" if len(self.chunks) == 1 else f" in {len(self.chunks)} chunks"
        left = f"; left out: {self.left_out!r}" if self.left_out else ""
        return f"{self.tokens} tokens{passes} ({self.room} fit into one){left}"


def check_syntax(given: str) -> None:
    """Refuse an unknown reading."""
    if given not in get_args(PromptSyntax):
        raise choice_error("prompt_syntax", given, get_args(PromptSyntax))


def read_prompt(
    encoder: TextEncoder, text: str, syntax: str = "plain", room: int | None = None
) -> ReadPrompt:
    """Say how a prompt is cut up, without encoding it.

    Args:    syntax: plain, long or a1111.  room: tokens in a chunk; None: all that fit.
    Raises:  UserError: unknown reading, room below 1, or syntax that cannot be read.
    """
    check_syntax(syntax)
    if room is not None and room < 1:
        raise UserError(f"the tokens in a chunk must be at least 1; got {room}.")
    tokenizer, most = encoder.tokenizer, encoder.max_length - 2
    if syntax == "plain":
        ids = [token for piece in tokenizer.pieces(text) for token in piece][:most]
        chunk = Chunk(tuple(ids), (1.0,) * len(ids))
        return ReadPrompt(text, (chunk,), most, tokenizer.left_out(text))
    room = most if room is None else min(room, most)
    parts = parse(text) if syntax == "a1111" else [[Run(text, 1.0)]]
    comma = tokenizer.backend.token_to_id(",</w>")
    return ReadPrompt(text, tuple(chunks_of(parts, tokenizer.pieces, room, comma)), room)


def encode_prompts(
    encoder: TextEncoder, texts: Sequence[str], syntax: str = "plain", room: int | None = None
) -> list[Tensor]:
    """The context of each prompt, (chunks · max_length, width); arguments as in `read_prompt`.

    Raises:  UserError: see `read_prompt`; before any work.
    """
    check_syntax(syntax)
    if syntax == "plain":
        return list(encoder.encode(texts))
    read = [read_prompt(encoder, text, syntax, room).chunks for text in texts]
    rows = [encoder.tokenizer.padded(chunk.ids) for chunks in read for chunk in chunks]
    states = encoder.encode_tokens(torch.tensor(rows, dtype=torch.int64))
    weighted = iter(
        [emphasised(z, _row_weights(c, len(z))) for z, c in zip(states, _flat(read), strict=True)]
    )
    return [torch.cat([next(weighted) for _ in chunks]) for chunks in read]


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states of a chunk (T, width) by weights (T,), and keep their mean.

    States whose weights are all 1 come back as they are.
    """
    if bool((weights == 1).all()):
        return states
    z = states.float()
    changed = z * weights.to(z.device)[:, None]
    ratio = float(changed.mean() / z.mean())
    if max(float(weights.min()), LEAST_RATIO) <= ratio <= float(weights.max()):
        changed = changed / ratio
    return changed.to(states.dtype)


def _row_weights(chunk: Chunk, length: int) -> Tensor:
    weights = torch.ones(length)
    weights[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights)
    return weights


def _flat(read: Sequence[tuple[Chunk, ...]]) -> list[Chunk]:
    return [chunk for chunks in read for chunk in chunks]
