"""Text encoder and U-Net as one network, for methods that train something in the text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.models.attention import ContextKV
from latentdiff.models.text_encoder import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig


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
