"""What a model knows: prompts that name none of it get a warning with what is nearest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch.nn import functional as F

from latentdiff.errors import warn
from latentdiff.models.clip_text import TextEncoder

#: How many of the nearest things are named.
NEAREST = 3


def warn_of_unknown_things(
    encoder: TextEncoder, texts: Iterable[str], known: Sequence[str]
) -> None:
    """Warn, once each, of texts that name none of the known things.

    Nearest is by cosine of the states at the end token, less the things' mean, which all share.

    Args: known: names in one; their regular plurals are met too. None: nothing is warned of.
    """
    if not known:
        return
    names = "|".join(map(_one_or_many, known))
    met = re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)
    unknown = [text for text in dict.fromkeys(texts) if text.strip() and not met.search(text)]
    if not unknown:
        return
    pooled = encoder.pooled([*known, *unknown]).float()
    pooled = F.normalize(pooled - pooled[: len(known)].mean(0), dim=1)
    scores = pooled[len(known) :] @ pooled[: len(known)].T
    nearest = scores.topk(min(NEAREST, len(known))).indices.tolist()
    for text, rows in zip(unknown, nearest, strict=True):
        warn(
            f"the prompt {text[:80]!r} names nothing that this model lists as known; the nearest "
            f"known things are {', '.join(known[k] for k in rows)}.",
            text,
        )


def _one_or_many(name: str) -> str:
    """A pattern of a name and its regular plural."""
    for ending, plural in (("y", "ies"), ("fe", "ves"), ("f", "ves")):
        if name.endswith(ending):
            stem = re.escape(name.removesuffix(ending))
            return f"{stem}(?:{ending}s?|{plural})"
    return f"{re.escape(name)}(?:e?s)?"
