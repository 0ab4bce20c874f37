"""The contexts of the images of one call, which may be of different lengths.

A prompt of several chunks has a longer context than others. Padding the shorter ones would change
what cross-attention reads, and so a picture by what stands beside it. Instead the images that go
through the network together are of one length, and where a prompt and its negative prompt differ,
each has a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import needs_unconditional
from latentdiff.models.finite import check_finite
from latentdiff.models.long_prompts import encode_prompts
from latentdiff.models.text_encoder import TextEncoder

ImageContexts = list[list[Tensor]]
"""Per image [of the prompt], or [of the negative prompt, of the prompt]; each (tokens, width)."""


def image_contexts(
    encoder: TextEncoder,
    prompts: Sequence[str],
    negatives: Sequence[str],
    scales: Sequence[float],
    copies: int,
    syntax: str,
    room: int | None,
) -> ImageContexts:
    """Encode each text once, and say what each image gets.

    Args:    negatives, scales: one for each prompt.  copies: images per prompt.
             syntax, room: see `read_prompt`.
    Raises:  NotFiniteError: what the text encoder makes of a prompt.
    """
    words = list(dict.fromkeys([*prompts, *negatives]))
    states = dict(zip(words, encode_prompts(encoder, words, syntax, room), strict=True))
    check_finite(torch.cat([*states.values()]), "its states", "the text encoder", encoder.module)
    guided = needs_unconditional(list(scales))
    return [
        [states[negative], states[prompt]] if guided else [states[prompt]]
        for prompt, negative in zip(prompts, negatives, strict=True)
        for _ in range(copies)
    ]


def passes(contexts: ImageContexts, batch_size: int) -> list[list[int]]:
    """Which images go through the network together: at most batch_size, of the same lengths."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, context in enumerate(contexts):
        groups.setdefault(tuple(map(len, context)), []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def batch_contexts(contexts: ImageContexts, own: Sequence[int]) -> list[Tensor]:
    """The contexts of one pass: [(B, tokens, width)], or the negative ones first."""
    return [torch.stack(half) for half in zip(*(contexts[i] for i in own), strict=True)]
