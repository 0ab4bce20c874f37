"""What train_clip.py does with a teacher: captions, other names and everyday words, distilled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.trainer.clip import ClipTrainConfig, trim_padding
from latentdiff.trainer.teacher import Distillation, SentenceTeacher, extra_texts, open_teacher


class Lesson:
    """The teacher, the head that speaks its language, and the words that no caption has.

    Args:
        teacher: the frozen sentence encoder.
        tokenizer: the student's.
        distillation: the trained head.
        words: what is taught beside the captions.
        seed: of the words' order.
    """

    def __init__(
        self,
        teacher: SentenceTeacher,
        tokenizer: ClipTokenizer,
        distillation: Distillation,
        words: Sequence[str],
        seed: int,
    ) -> None:
        self.teacher, self.tokenizer, self.distillation = teacher, tokenizer, distillation
        self.words, self.seed = words, seed

    def loss(self, clip: Any, captions: list[str], step: int, device: torch.device) -> Tensor:
        """Distil a quarter of a step's captions and as many other texts.

        The teacher is ten times the student's size, so its share of the time decides the number.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = max(1, len(captions) // 4)
        texts = captions[:count] + extra_texts(self.words, count, generator)
        token_ids = trim_padding(self.tokenizer(texts)).to(device)
        pooled = clip.text_model(input_ids=token_ids).pooler_output
        return self.distillation(pooled, self.teacher(texts))


def open_lesson(
    config: ClipTrainConfig, tokenizer: ClipTokenizer, width: int, device: torch.device
) -> Lesson | None:
    """Open the teacher that a configuration names, if any. Raises: UserError: it is not there."""
    if config.teacher is None:
        return None
    teacher = open_teacher(config.teacher).to(device)
    distillation = Distillation(width, teacher.width).to(device)
    words = teacher.words(config.teacher_words)
    return Lesson(teacher, tokenizer, distillation, words, config.stage.seed)
