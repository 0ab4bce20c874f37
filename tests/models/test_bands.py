"""Slicing and tiling of autoencoders: the pixels and moments of the whole, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.models import bands
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.vae import AutoencoderKL
from tests import random_models

#: Of the range of pixels, which is 2; latents are compared with their deviation.
BOUND = 2 / 255 / 10


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def quarter_width() -> Autoencoder:
    """Stable Diffusion's autoencoder with a quarter of its channels, and random weights."""
    torch.manual_seed(0)
    config = {
        "block_out_channels": [32, 64, 128, 128],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    }
    return Autoencoder(AutoencoderKL(config).eval().requires_grad_(False))


@pytest.fixture(params=["kl", "tiny"], scope="module")
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    if request.param == "kl":
        return quarter_width()
    return Autoencoder(random_models.make_vae("tiny").requires_grad_(False))


@torch.no_grad()
@pytest.mark.parametrize("half", ["decode", "encode_moments"])
def test_bands_give_what_the_whole_gives(
    autoencoder: Autoencoder, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is dark on one side: tiles with statistics of their own would differ."""
    monkeypatch.setattr(bands, "PIXELS", 2**9)
    down, run = autoencoder.downscale, getattr(autoencoder, half)
    size = 192 * (1 + autoencoder.is_tiny), 32
    channels, rows, columns = (
        (4, *(side // down for side in size)) if half == "decode" else (3, *size)
    )
    x = torch.randn(2, channels, rows, columns, generator=torch.Generator().manual_seed(1))
    x = (x * torch.linspace(0.1, 1, rows)[:, None] + torch.linspace(-1, 1, rows)[:, None]) / 2
    with LargestTensor() as whole:
        wanted = run(x)
    monkeypatch.setattr(autoencoder, "tiling", True)
    monkeypatch.setattr(autoencoder, "slicing", True)
    with LargestTensor() as banded:
        found = run(x)
    assert found.shape == wanted.shape
    if half == "encode_moments":
        found, wanted = (y.chunk(2, 1)[0] / wanted.chunk(2, 1)[0].std() for y in (found, wanted))
    assert float((found - wanted).abs().max()) < 2 * BOUND
    assert float(wanted.std()) > 0.05
    assert banded.size < whole.size / 2
