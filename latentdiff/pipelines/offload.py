"""Parts of a pipeline on the device only while they compute, as diffusers' model offload does.

The largest part, the U-Net, then decides how much memory a device needs.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from latentdiff.pipelines.generate import LatentDiffusionPipeline

Part = Literal["text_encoder", "unet", "autoencoder"]


class Offload:
    """All parts of a pipeline on the CPU but the one that was used last.

    Attributes: device: where they compute.
    """

    def __init__(self, pipeline: LatentDiffusionPipeline, device: torch.device) -> None:
        """Take over a pipeline's parts."""
        self.device = device
        self._owners = pipeline.text_encoder, pipeline.autoencoder
        text, autoencoder = self._owners
        self._modules: dict[Part, nn.Module] = {
            "text_encoder": text,
            "unet": pipeline.unet,
            "autoencoder": autoencoder,
        }
        for module in self._modules.values():
            module.to("cpu")
        self._here: Part | None = None
        text.before_use = partial(self.bring, "text_encoder")
        autoencoder.before_use = partial(self.bring, "autoencoder")
        # A task may decode within a step.
        self._hook = pipeline.unet.register_forward_pre_hook(lambda *_: self.bring("unet"))

    def bring(self, part: Part) -> None:
        """Put a part on the device, and the one that was there on the CPU."""
        if part != self._here:
            if self._here is not None:
                self._modules[self._here].to("cpu")
            self._modules[part].to(self.device)
            self._here = part

    def remove(self) -> None:
        """Leave the parts where they are from now on."""
        self._hook.remove()
        for owner in self._owners:
            owner.before_use = None
