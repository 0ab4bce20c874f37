"""The vocabulary of OpenAI's CLIP, which single files of Stable Diffusion 1.x and 2.x rely on.

It follows from 48,894 merges alone: every byte, every byte at a word's end, every merge, the two
marks. Source of assets/clip_merges.txt.gz: lines 2 to 48895 of clip/bpe_simple_vocab_16e6.txt.gz in
github.com/openai/CLIP (MIT licence, Copyright 2021 OpenAI).
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.models.added_tokens import BOS, EOS, MARKS, added_entries, added_token, text_of
from latentdiff.models.tokenizer import ClipTokenizer, build_backend, stated_length

MERGES: Path = Path(__file__).parents[1] / "assets" / "clip_merges.txt.gz"
#: The one key of a description that stands for this vocabulary.
CLIP = "clip"


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The merges, most frequent first."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    return tuple((a, b) for a, b in (line.split() for line in lines))


@cache
def clip_vocabulary() -> dict[str, int]:
    """Token → id."""
    letters = _letters()
    words = letters + [letter + "</w>" for letter in letters]
    words += ["".join(pair) for pair in clip_merges()] + [BOS, EOS]
    return {word: number for number, word in enumerate(words)}


def clip_tokenizer(
    pad_token: str, max_length: int = 77, added: Sequence[Mapping[str, Any]] = ()
) -> ClipTokenizer:
    """CLIP's tokenizer.

    Args:    pad_token: <|endoftext|> in Stable Diffusion 1.x, ! in 2.x.
             max_length: ids per text, marks included.
             added: words and marks beside those of CLIP, see `added_tokens.added_entries`.
    """
    from tokenizers.models import BPE

    model = BPE(
        vocab=clip_vocabulary(),
        merges=list(clip_merges()),
        unk_token=EOS,
        end_of_word_suffix="</w>",
    )
    config = MARKS | {"pad_token": pad_token}
    tokens = [*(added_token(mark, special=True) for mark in (BOS, EOS)), *map(added_token, added)]
    backend = build_backend(model, config, [(None, token) for token in tokens])
    return ClipTokenizer(backend, config, max_length)


def describe_tokenizer(tokenizer: ClipTokenizer) -> dict[str, Any]:
    """What `tokenizer_of` makes the same tokenizer of: CLIP's by its name, others as a whole."""
    if tokenizer.backend.get_vocab(with_added_tokens=False) == clip_vocabulary():
        pad = text_of(tokenizer.config.get("pad_token") or EOS)
        entries = added_entries(tokenizer.backend).values()
        own = [entry for entry in entries if entry["content"] not in (BOS, EOS)]
        said = {"pad_token": pad, "max_length": tokenizer.max_length}
        return {CLIP: said | ({"added_tokens": own} if own else {})}
    config = {k: v for k, v in tokenizer.config.items() if k != "name_or_path"}
    return {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": config | {"model_max_length": tokenizer.max_length},
    }


def tokenizer_of(description: Mapping[str, Any], max_length: int) -> ClipTokenizer:
    """The tokenizer of a description.

    Args:    max_length: what the text encoder has positions for; the description may say less.
    Raises:  UserError: no such description.
    """
    from tokenizers import Tokenizer

    try:
        if CLIP in description:
            said = description[CLIP]
            length = stated_length({"model_max_length": said.get("max_length")}, max_length)
            return clip_tokenizer(str(said["pad_token"]), length, said.get("added_tokens", ()))
        config = dict(description["tokenizer_config.json"])
        backend = Tokenizer.from_str(description["tokenizer.json"])
        return ClipTokenizer(backend, config, stated_length(config, max_length))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"the file describes no tokenizer: {error!r}") from error


def _letters() -> list[str]:
    """How byte-level BPE writes bytes: those that print as themselves, the rest from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(256 - len(printed))]
