"""The vocabulary of OpenAI's CLIP, which single files of Stable Diffusion 1.x and 2.x rely on.

It follows from 48,894 merges alone: every byte, every byte at a word's end, every merge, the two
marks. Source of assets/clip_merges.txt.gz: lines 2 to 48895 of clip/bpe_simple_vocab_16e6.txt.gz in
github.com/openai/CLIP (MIT licence, Copyright 2021 OpenAI).
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.models.tokenizer import BOS, EOS, ClipTokenizer, build_backend

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


def clip_tokenizer(pad_token: str, max_length: int = 77) -> ClipTokenizer:
    """CLIP's tokenizer.

    Args:    pad_token: <|endoftext|> in Stable Diffusion 1.x, ! in 2.x.
             max_length: ids per text, marks included.
    """
    from tokenizers.models import BPE

    model = BPE(
        vocab=clip_vocabulary(),
        merges=list(clip_merges()),
        unk_token=EOS,
        end_of_word_suffix="</w>",
    )
    config = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    return ClipTokenizer(build_backend(model, config), config, max_length)


def describe_tokenizer(tokenizer: ClipTokenizer) -> dict[str, Any]:
    """What `tokenizer_of` makes the same tokenizer of: CLIP's by its name, others as a whole."""
    if tokenizer.backend.get_vocab(with_added_tokens=True) == clip_vocabulary():
        pad = tokenizer.config.get("pad_token", EOS)
        pad = pad["content"] if isinstance(pad, dict) else pad
        return {CLIP: {"pad_token": pad, "max_length": tokenizer.max_length}}
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
            stated = min(int(said.get("max_length", max_length)), max_length)
            return clip_tokenizer(str(said["pad_token"]), stated)
        config = dict(description["tokenizer_config.json"])
        backend = Tokenizer.from_str(description["tokenizer.json"])
        stated = min(int(config.get("model_max_length") or max_length), max_length)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"the file describes no tokenizer: {error!r}") from error
    return ClipTokenizer(backend, config, stated)


def _letters() -> list[str]:
    """How byte-level BPE writes bytes: those that print as themselves, the rest from 256 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(256 - len(printed))]
