"""What a fine-tuning method is to a training: what it trains, with which loss, and what it saves.

Text encoder and U-Net as one network, for methods that train something in the text encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from latentdiff.diffusion.objective import Model
from latentdiff.models.attention import ContextKV
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.unet import UNet, with_extra
from latentdiff.models.unet_config import UNetConfig
from latentdiff.weights import raw_bytes

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components

Loss = Callable[[Model, Any], Tensor]
"""(model, LatentBatch) → loss of each sample, (B,)."""
Extra = Callable[[Any, Sequence[int], Sequence[int]], Tensor]
"""(data, indices, a seed for each) → channels (B, E, h, w) beside the noisy latents."""


class Method:
    """Base of the fine-tuning methods: all weights of the U-Net are trained, by the plain loss.

    A method prepares the parts in `__init__`, in place, and overrides what differs.

    Args:
        components: the U-Net already where it will be trained, in float32.
    Raises: UserError: parts that the method cannot train.
    Attributes:
        module: (x_t, timestep, batch.context) → prediction; the U-Net, or a network around it. Its
            parameters that require a gradient are trained, averaged and checkpointed.
        encode: captions (B) → batch.context, what the module takes third: the frozen text
            encoder's states, or token ids where the text encoder is part of the module.
        extra: what the U-Net takes in channels after those of x_t; None: nothing.
        usage: how `latentdiff generate` is told to use what was saved: its options, with {output}
               in them.
        example: a prompt that shows what was learned.
    """

    #: Whether the model's own weights stay as they are, so that nobody need store them.
    adds: ClassVar[bool] = False
    usage: ClassVar[str] = "--model {output}/model"

    def __init__(self, components: Components) -> None:
        self.module: nn.Module = components.unet
        self.encode: Callable[[list[str]], Tensor] = components.text_encoder.encode
        self.extra: Extra | None = None
        self.example = "a cat"

    def loss(self, denoising_loss: Loss, model: nn.Module, batch: Any) -> Tensor:
        """The loss of each sample, (B,): here that of the training itself.

        Args:
            denoising_loss: Algorithm 1.
            model: `module` as the processes have it.  batch: a LatentBatch.
        """
        return denoising_loss(with_extra(model, batch.extra), batch)

    def export(self, components: Components, output: Path, dtype: torch.dtype) -> list[Path]:
        """Write the result, on one process, while the module holds the averaged weights.

        Args:    components: the parts, whole where training has them sharded.
                 output: the run's folder.  dtype: of the weights on disk.
        Returns: the files or folders.
        Raises:  UserError: what was there before is as it was.
        """
        raise NotImplementedError

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def about(self) -> str:
        """How much is trained, and the memory of weights, gradients, moments and average.

        Against training the same network whole, with AdamW in float32; activations come on top.
        """
        trained = sum(p.numel() for p in self.trained().values())
        everything = sum(p.numel() for p in self.module.parameters())
        fixed, each = 4 * everything, 16  # 4 bytes each: gradient, two moments, average
        part, whole = ((fixed + each * n) / 2**20 for n in (trained, everything))
        instead = f" (all trained: {whole:.0f} MB)" * (trained < everything)
        return (
            f"trained: {trained:,} of {everything:,} parameters ({trained / everything:.2%}); "
            f"weights, gradients, moments and average take {part:.0f} MB{instead}."
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


class TextConditioned(nn.Module):
    """(x_t, timestep, token ids) → prediction: the context is computed within, with a gradient.

    Stands for the U-Net in training and validation; the tokenizer is then what encodes captions.
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
