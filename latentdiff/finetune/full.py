"""Training all weights of the U-Net, from scratch or from what a pretrained model knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from latentdiff.finetune.method import Method

if TYPE_CHECKING:
    from latentdiff.formats.folder import Components


@dataclass(frozen=True)
class FullConfig:
    """All weights of the U-Net are trained; there is nothing to choose."""

    kind: Literal["full"] = "full"
    """full: all weights of the U-Net; the run ends with a model folder."""


class Full(Method):
    """The U-Net as it is; the run ends with the whole model."""

    def __init__(self, components: Components, config: FullConfig) -> None:
        super().__init__(components)

    def export(self, components: Components, output: Path, dtype: torch.dtype) -> list[Path]:
        """Write OUTPUT/model."""
        from latentdiff.formats.folder import save_components

        return [save_components(output / "model", components, dtype)]
