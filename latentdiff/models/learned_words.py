"""Words whose token embeddings were learned: textual inversion.

A new word gets one token, or n of them, behind all that there are; NAME, NAME_1, NAME_2, … as
diffusers calls them. Its embeddings are new rows of the tower's table, and nothing else changes: a
text in which the word does not occur has the tokens and states that it had. A name that begins or
ends with a letter, digit or _ is met as a whole word alone, not within a longer one.

Source: Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.tokenizer import ClipTokenizer

_WORD_EDGE = re.compile(r"^\w|\w$")


def add_word(encoder: TextEncoder, word: str, vectors: Tensor) -> list[int]:
    """Teach a text encoder, which is changed in place, a word.

    Args:    word: how prompts name it, e.g. <my-cat>.  vectors: (n, width) its embeddings.
    Returns: the ids of its tokens.
    Raises:  UserError: the word means something already, cannot be a word, or the vectors are of
             another width; the encoder is as it was.
    """
    if vectors.ndim != 2 or vectors.shape[1] != encoder.width or not len(vectors):
        raise UserError(
            f"the embedding of {word!r} must be (vectors, {encoder.width}) for this text encoder; "
            f"got {tuple(vectors.shape)}. Widths of 768 are for Stable Diffusion 1.x, 1024 for 2.x."
        )
    if not bool(vectors.isfinite().all()):
        raise UserError(f"the embedding of {word!r} holds NaN or infinity; the file is damaged.")
    names = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
    tokenizer = _with_tokens(encoder.tokenizer, names)
    ids = [tokenizer.backend.token_to_id(name) for name in names]
    old = encoder.module.embeddings.token_embedding.weight
    table = old.new_zeros(max(max(ids) + 1, len(old)), encoder.width)
    table[: len(old)] = old.detach()
    table[ids] = vectors.to(old)
    encoder.tokenizer = tokenizer
    encoder.module.embeddings.token_embedding = nn.Embedding.from_pretrained(table)
    encoder.module.config["vocab_size"] = len(table)
    return ids


def check_word(tokenizer: ClipTokenizer, word: str) -> None:
    """Refuse a word that could not be told from other text. Raises: UserError."""
    if not word.strip() or word.split() != [word]:
        raise UserError(
            f"the name of a learned word must be without spaces, such as <my-cat>; got {word!r}. "
            "Choose another with token=…"
        )
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    base, _, number = word.rpartition("_")
    part = number.isdecimal() and tokenizer.backend.token_to_id(base) is not None
    if part or word in known or f"{word}</w>" in known or len(tokenizer.pieces(word)) < 2:
        raise UserError(
            f"{word!r} is a word that the text encoder knows already, or part of one, and prompts "
            "with it would change. Choose another name with token=…, such as "
            f"{'<' + word.strip('<>') + '-2>'!r}."
        )


def starting_vectors(encoder: TextEncoder, words: str, count: int) -> Tensor:
    """Embeddings to start learning from, (count, width).

    Args: words: their tokens' embeddings, spread over the vectors; empty: the mean of all.
    """
    table = encoder.module.embeddings.token_embedding.weight.detach().float()
    ids = [token for piece in encoder.tokenizer.pieces(words) for token in piece]
    if not ids:
        return table.mean(0, keepdim=True).repeat(count, 1)
    return table[[ids[i * len(ids) // count] for i in range(count)]].clone()


class TrainedRows(nn.Module):
    """An embedding table of which some rows are trained and the others can't move.

    Args: table: as it is.  rows: ids of the trained rows, one after the other.
    """

    def __init__(self, table: nn.Embedding, rows: list[int]) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first = rows[0]
        self.vectors = nn.Parameter(table.weight.detach()[rows].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, width) of ids (B, T)."""
        place = ids - self.first
        inside = (place >= 0) & (place < len(self.vectors))
        own = F.embedding(place.clamp(0, len(self.vectors) - 1), self.vectors)
        return torch.where(inside[..., None], own, self.table(ids))


def _with_tokens(tokenizer: ClipTokenizer, names: list[str]) -> ClipTokenizer:
    from tokenizers import AddedToken, Tokenizer

    for name in names:
        check_word(tokenizer, name)
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([AddedToken(n, single_word=bool(_WORD_EDGE.search(n))) for n in names])
    larger = ClipTokenizer(backend, tokenizer.config, tokenizer.max_length)
    if larger.pieces(names[0]) != [tuple(backend.token_to_id(name) for name in names)]:
        raise UserError(
            f"the tokenizer does not read {names[0]!r} as one word. Choose another name with "
            "token=…, of letters, digits and - between < and >."
        )
    return larger
