"""What a fine-tuning method makes of a model: the part to train, and how to hand it on.

Text encoder and U-Net as one network, for methods that train something in the text encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.attention import ContextKV
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.weights import raw_bytes


class TokenIds:
    """Stands where a text encoder would: says what was written, not what it means.

    Args: tokenizer: texts → ids (B, tokens).
    """

    def __init__(self, tokenizer: Callable[[Sequence[str]], Tensor]) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, tokens), int64."""
        return self._tokenizer(texts)


@dataclass(frozen=True)
class Trainee:
    """What is trained, and what becomes of it.

    Args that a method may leave out are those of training the whole U-Net.
    """

    module: Any
    """(x_t, timestep, context) → prediction. Its parameters that require a gradient are trained,
    averaged and checkpointed; the U-Net itself, or a `TextConditioned` around it."""
    encoder: Any
    """What turns captions into the module's context: the frozen text encoder, or `TokenIds`."""
    export: Callable[[Path, torch.dtype], list[Path]] | None = None
    """(the run's folder, number format) → the files written; called on one process while the
    module holds the averaged weights. None: the run exports a whole model folder."""
    usage: str = ""
    """How generate.py is told to use what was written: its options, with {output} in them."""

    example: str = "a cat"
    """A prompt that shows what was learned."""

    @property
    def adds(self) -> bool:
        """Whether the model's own weights stay as they are, so that nobody need store them."""
        return self.export is not None

    def about(self) -> str:
        """How much is trained, and the memory of weights, gradients, moments and average.

        Against training the same network whole, with AdamW in float32; activations come on top.
        """
        trained = sum(p.numel() for p in self.trained().values())
        everything = sum(p.numel() for p in self.module.parameters())
        fixed, each = 4 * everything, 16  # 4 bytes each: gradient, two moments, average
        part, whole = ((fixed + each * n) / 2**20 for n in (trained, everything))
        return (
            f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.2%}); "
            f"weights, gradients, moments and average take {part:.0f} MB (all trained: "
            f"{whole:.0f} MB)."
        )

    def facts(self) -> dict[str, str]:
        """What a resumed run must find unchanged: the frozen weights, where nobody stores them."""
        if not self.adds:
            return {}
        digest = hashlib.blake2b(digest_size=12)
        for parameter in self.module.parameters():
            if not parameter.requires_grad:
                digest.update(raw_bytes(parameter))
        return {"frozen weights": digest.hexdigest()}

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}


class TextConditioned(nn.Module):
    """(x_t, timestep, token ids) → prediction: the context is computed within, with a gradient.

    Stands for the U-Net in training and validation; see `TokenIds` for where the ids come from.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    @property
    def config(self) -> UNetConfig:
        """The U-Net's."""
        return self.unet.config

    def project_context(self, token_ids: Tensor) -> ContextKV:
        """`UNet.project_context` of the texts with these ids (B, tokens)."""
        return self.unet.project_context(self._context(token_ids))

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        token_ids: Tensor | None = None,
        *,
        kv: ContextKV | None = None,
    ) -> Tensor:
        """As `UNet.forward`, with token ids (B, tokens) in place of the context."""
        if kv is not None or token_ids is None:
            return self.unet(x_t, timestep, kv=kv)
        return self.unet(x_t, timestep, self._context(token_ids))

    def _context(self, token_ids: Tensor) -> Tensor:
        # The tower is small, and generating does not round it either.
        with torch.autocast(token_ids.device.type, enabled=False):
            return self.text_encoder.encode_tokens(token_ids)
