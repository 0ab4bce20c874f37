"""Textual inversion: a new word is learned, the model is not.

    min over v of  E |y − unet(x_t, t, tower(… v …))|²     v: the word's token embeddings

All weights stay; the gradient goes through U-Net and text tower to the word's vectors. The loss is
that of any training, with every caption set into a template that has the word in it.

Source: Gal et al. 2022, eq. 2, arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.finetune.method import Method, TextConditioned
from latentdiff.formats.embedding import FILE, write_embedding
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.prompts import add_word
from latentdiff.models.tokenizer import ClipTokenizer

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components


@dataclass(frozen=True)
class TextualInversionConfig:
    """A word for what the images have in common; the model stays as it is."""

    kind: Literal["textual_inversion"] = "textual_inversion"
    """textual_inversion: a new word's token embeddings; the run ends with
    OUTPUT/learned_embeds.safetensors, which this package, diffusers and A1111 open."""
    token: str = "<thing>"
    """The new word, as prompts will have it; it must not mean anything yet."""
    vectors: int = 1
    """How many tokens it takes: more say more, and leave less room in a prompt."""
    initial: str = ""
    """Words that come near what is learned, to start from; empty starts from the mean token."""
    template: str = "{caption} in the style of {token}"
    """What a caption becomes that does not name the word itself; for one thing in all images
    `a photo of {token}`."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = []
        if self.token.split() != [self.token]:
            problems.append(f"token must be a word without spaces; got {self.token!r}.")
        if self.vectors < 1:
            problems.append(f"vectors must be at least 1; got {self.vectors}.")
        if "{token}" not in self.template:
            problems.append(f"template must hold {{token}}; got {self.template!r}.")
        return problems


class TemplateCaptions:
    """Captions → token ids (B, tokens) of the template filled in with caption and learned word.

    The empty caption, for guidance, stays empty. One that is too long loses its own last words, not
    the learned one.
    """

    def __init__(self, tokenizer: ClipTokenizer, token: str, template: str) -> None:
        self._tokenizer, self._token, self._template = tokenizer, token, template

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64."""
        return self._tokenizer([self.fill(text) for text in texts])

    def fill(self, caption: str) -> str:
        """The text that is trained on."""
        if not caption or self._token.lower() in caption.lower():
            return caption
        words = caption.split()
        while True:
            text = self._template.replace("{token}", self._token)
            text = text.replace("{caption}", " ".join(words))
            if not words or not self._tokenizer.fit(text)[1]:
                return text
            words.pop()


class TextualInversion(Method):
    """A frozen model whose text encoder has the new word's vectors, which are trained.

    Raises: UserError: the word is known already, or does not fit into a prompt.
    """

    adds = True
    usage = f"--embedding {{output}}/{FILE}"

    def __init__(self, components: Components, config: TextualInversionConfig) -> None:
        super().__init__(components)
        encoder = components.text_encoder
        if config.vectors > encoder.max_length // 2:
            raise UserError(
                f"finetune.vectors must be at most {encoder.max_length // 2}, half of what the "
                f"text encoder takes; got {config.vectors}."
            )
        components.unet.requires_grad_(False)
        encoder.requires_grad_(False)
        start = starting_vectors(encoder, config.initial, config.vectors)
        ids = add_word(encoder, config.token, start)
        self.token = config.token
        self.rows = TrainedRows(encoder.module.embeddings.token_embedding, ids)
        encoder.module.embeddings.token_embedding = self.rows
        self.module = TextConditioned(components.unet, encoder)
        self.encode = TemplateCaptions(encoder.tokenizer, config.token, config.template)
        self.example = self.encode.fill("a cat")

    def export(self, components: Components, output: Path, dtype: torch.dtype) -> list[Path]:
        """Write the embedding, in float32: small, and rounding easily gives it another meaning."""
        return [write_embedding(output / FILE, self.token, self.rows.vectors)]


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
