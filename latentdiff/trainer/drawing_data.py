"""What a text tower learns to draw from: captions, their pictures, and what it said before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.latents import build_latent_cache
from latentdiff.data.source import DataConfig, Source
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.trainer.drawing import end_places
from latentdiff.trainer.output import default_cache
from latentdiff.trainer.stage import sample_indices


def subject_pictures(
    source: Source, config: DataConfig, root: Path, device: torch.device
) -> tuple[Tensor, list[int]]:
    """What the texts are about: pictures (N, C, h, w), and the row of each of the source's entries.

    Args: root: the model with the autoencoder.  device: where that encodes.

    The channels are latents and, where the source knows it, how opaque the thing is at each place.
    A source without subjects is taken as it is.
    """
    subjects = getattr(source, "subjects", None)
    plain, rows = subjects() if subjects else (source, list(range(len(source))))
    autoencoder = load_autoencoder(root / "vae")
    data = build_latent_cache(plain, autoencoder, config, default_cache(), device=device)
    moments = data.read(range(len(data))).moments.float()
    latents = autoencoder.latents_from_moments(moments, torch.zeros(()))
    places = [int(index) for index in data.source_indices]
    where = {index: row for row, index in enumerate(places)}
    rows = [where.get(row, -1) for row in rows]
    mask = getattr(plain, "mask", None)
    if mask is None:
        return latents, rows
    height, width = latents.shape[-2:]
    opaque = [np.asarray(mask(i), np.float32) / 255 for i in places]
    shrunk = F.adaptive_avg_pool2d(torch.from_numpy(np.stack(opaque))[:, None], (height, width))
    return torch.cat([latents, shrunk], 1), rows


class Texts:
    """Captions as token ids, drawn by (seed, step).

    Args: draws: of so many captions drawn the shortest is taken; names are what has to be learnt.
    """

    def __init__(
        self, source: Source, rows: list[int], tokenizer: Any, seed: int, draws: int = 2
    ) -> None:
        usable = [i for i in range(len(source)) if rows[i] >= 0]
        self.captions = [source.captions(i) for i in usable]
        self.rows = torch.tensor([rows[i] for i in usable])
        self.tokenizer, self.seed, self.draws = tokenizer, seed, draws
        self._ids: dict[str, Tensor] = {}

    def __call__(self, step: int, count: int) -> tuple[list[str], Tensor, Tensor]:
        """Return (texts, ids, picture rows), the shortest text first."""
        chosen = sample_indices(step, len(self.captions), count, self.seed).tolist()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        draws = torch.rand(count, self.draws, generator=generator).tolist()
        texts = []
        for index, pair in zip(chosen, draws, strict=True):
            of = self.captions[index]
            texts.append(min((of[int(u * len(of))] for u in pair), key=len))
        ids = self._tokens(texts)
        order = end_places(ids, self.tokenizer.end_id).argsort(stable=True)
        return [texts[i] for i in order.tolist()], ids[order], self.rows[chosen][order]

    def _tokens(self, texts: list[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if new:
            self._ids |= zip(new, self.tokenizer(new), strict=True)
        return torch.stack([self._ids[text] for text in texts])


class OldFeatures:
    """The old tower's unit vectors in the CLIP's shared space."""

    def __init__(self, old: TextEncoder, head: dict[str, Tensor]) -> None:
        self.old, self.projection = old, head["text_projection.weight"].float()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of texts."""
        if not texts:
            return torch.empty(0, len(self.projection))
        ids = self.old.tokenizer(texts)
        ends = end_places(ids, self.old.tokenizer.end_id)
        states = self.old.encode_tokens(ids[:, : int(ends.max()) + 1]).float()
        return F.normalize(states[torch.arange(len(ids)), ends] @ self.projection.T, dim=1)
