"""What is said about a picture this time: one of its captions, its tags reordered, some left out.

Decided anew for every global sample index and by it alone, so captions on disk stay as they are
and a resumed run says the same.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from latentdiff.diffusion.noise import mix
from latentdiff.trainer.order import choose_caption

# Independent of the noise and of the choice among captions, which are drawn from (seed, n) too.
_TAG_STREAM = 0x54414753


@dataclass(frozen=True)
class CaptionConfig:
    """How captions vary from one meeting to the next; of several captions one is drawn anyway."""

    shuffle_tags: bool = False
    """Put the parts between commas into another order each time ("1girl, red hair, smile")."""
    keep_tags: int = 0
    """So many first parts stay where they are and are never dropped."""
    tag_dropout: float = 0.0
    """Share of the other parts that is left out each time; 0 … 1."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = []
        if self.keep_tags < 0:
            problems.append(f"keep_tags must be at least 0; got {self.keep_tags}.")
        if not 0 <= self.tag_dropout <= 1:
            problems.append(f"tag_dropout must lie in 0 … 1; got {self.tag_dropout}.")
        return problems


def say(captions: Sequence[str], seed: int, sample: int, config: CaptionConfig) -> str:
    """The caption of a picture for a global sample index; at least one part of it is left."""
    caption = choose_caption(captions, seed, sample)
    if not config.shuffle_tags and not config.tag_dropout:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    if len(tags) < 2:
        return caption
    draws = random.Random(mix(mix(seed, _TAG_STREAM), sample))
    first, rest = tags[: config.keep_tags], tags[config.keep_tags :]
    drawn = [(draws.random(), draws.random(), tag) for tag in rest]
    kept = [(place, tag) for fate, place, tag in drawn if fate >= config.tag_dropout]
    if config.shuffle_tags:
        kept.sort(key=lambda item: item[0])
    return ", ".join([*first, *(tag for _, tag in kept)] or tags[:1])
