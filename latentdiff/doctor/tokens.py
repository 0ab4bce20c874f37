"""How many tokens a caption takes: counted by the text encoder's tokenizer, or by CLIP's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentdiff.embedded import named
from latentdiff.json_text import read_json
from latentdiff.models.added_tokens import EOS

#: What CLIP's text encoder takes, begin and end mark included.
CLIP_LIMIT = 77


@dataclass(frozen=True)
class TokenCounter:
    """A way of counting."""

    count: Callable[[str], int]
    """Text → tokens, begin and end mark included."""
    limit: int
    """What the text encoder takes."""
    words: str
    """How the report calls it."""


def open_counter(folder: str | None, limit: int | None) -> TokenCounter:
    """Open a tokenizer.

    Args:    folder: a model folder, its tokenizer folder, or `embedded`; None: CLIP's own, which
             Stable Diffusion 1.x and 2.x have.
             limit: tokens that the text encoder takes; None asks the folder, else 77.
    Raises:  UserError: the folder holds no tokenizer.
    """
    if folder is None:
        from latentdiff.models.clip_vocabulary import clip_tokenizer

        count, words = clip_tokenizer(EOS).count, "counted by CLIP's own tokenizer"
        return TokenCounter(count, limit or CLIP_LIMIT, words)
    from latentdiff.models.tokenizer import load_tokenizer

    home = Path(named(folder)).expanduser()
    inner = home / "tokenizer"
    inner = inner if inner.is_dir() else home
    tokenizer = load_tokenizer(inner, limit or _positions(home) or CLIP_LIMIT)
    words = f"counted by the tokenizer in {inner}"
    return TokenCounter(tokenizer.count, limit or tokenizer.max_length, words)


def _positions(folder: Path) -> int | None:
    try:
        return int(read_json(folder / "text_encoder" / "config.json")["max_position_embeddings"])
    except (OverflowError, ValueError, KeyError, TypeError):
        return None
