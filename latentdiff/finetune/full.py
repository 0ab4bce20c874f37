"""Training all weights of the U-Net, from scratch or from what a pretrained model knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from latentdiff.finetune.trainee import Trainee

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components


@dataclass(frozen=True)
class FullConfig:
    """All weights of the U-Net are trained; there is nothing to choose."""

    kind: Literal["full"] = "full"
    """full: all weights of the U-Net; the run ends with a model folder."""


def apply(components: Components, config: FullConfig) -> Trainee:
    """Leave the U-Net as it is: all of it is trained."""
    return Trainee(components.unet, components.text_encoder)
