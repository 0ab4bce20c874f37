"""CLIP's vocabulary and other tokenizers, described and made again."""

from __future__ import annotations

import pytest

from latentdiff.embedded import EMBEDDED_MODEL
from latentdiff.errors import UserError
from latentdiff.models.tokenizer import (
    clip_merges,
    clip_tokenizer,
    clip_vocabulary,
    describe_tokenizer,
    load_tokenizer,
    tokenizer_of,
)

TEXTS = ["a photo of a cat", "Ünïcödé 日本 😀 don't 12ab!!", "  tabs\t and—dashes (word:1.3)", ""]


def test_the_same_ids_as_transformers() -> None:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    theirs = CLIPTokenizer(vocab=clip_vocabulary(), merges=list(clip_merges()))
    rows = clip_tokenizer("!")(TEXTS)
    for row, text in zip(rows.tolist(), TEXTS, strict=True):
        expected = theirs(text).input_ids
        assert row == expected + [0] * (77 - len(expected))


def test_published_ids() -> None:
    # As printed in the documentation of CLIP and of many tools for this sentence.
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == 49408 and vocabulary["<|startoftext|>"] == 49406
    assert clip_tokenizer("!")(["a photo of a cat"])[0, :7].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407,
    ]  # fmt: skip


def test_described_and_made_again() -> None:
    for tokenizer in (
        clip_tokenizer("!"),
        clip_tokenizer("<|endoftext|>"),
        load_tokenizer(EMBEDDED_MODEL / "tokenizer", 40),
    ):
        again = tokenizer_of(describe_tokenizer(tokenizer), tokenizer.max_length)
        assert (again(TEXTS) == tokenizer(TEXTS)).all()
        assert (again.max_length, again.pad_id) == (tokenizer.max_length, tokenizer.pad_id)
    assert describe_tokenizer(clip_tokenizer("!")) == {"clip": {"pad_token": "!", "max_length": 77}}
    with pytest.raises(UserError, match="describes no tokenizer"):
        tokenizer_of({"tokenizer.json": "{}"}, 77)
