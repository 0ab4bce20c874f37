"""LPIPS: how different two images look, by the features of a pretrained VGG16.

The trunk and the calibration are those of ST-LPIPS (shift-tolerant: a blur before each stride),
whose weight file the PyPI package `stlpips-pytorch` ships; only that file is read.
Source: Zhang et al. 2018, arXiv:1801.03924; Ghildyal & Liu 2022, arXiv:2207.13686.

A patch discriminator: judges every patch of an image as real or reconstructed.

Source: Isola et al. 2017, arXiv:1611.07004; hinge loss as in VQGAN, Esser et al. 2021,
arXiv:2012.09841.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError

_PACKAGE = "stlpips_pytorch"
#: Index of each convolution in the weight file, by the stage that it belongs to.
_STAGES = ((0, 2), (6, 8), (12, 14, 16), (20, 22, 24), (28, 30, 32))


def find_weights() -> Path | None:
    """Return the installed package's VGG weight file, or None when it is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "weights/vST0.0/vgg_shift_tolerant.pth"
    return file if file.is_file() else None


class PerceptualDistance(nn.Module):
    """Frozen LPIPS distance between images in [−1, 1].

    Args:
        weights: the weight file; None takes the installed package's.
        stages: how many of the five VGG stages to use; fewer cost less and see only detail.
    Raises: UserError: when no weight file is found.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path | None = None, stages: int = 5) -> None:
        super().__init__()
        file = weights or find_weights()
        if file is None:
            raise UserError(
                "the perceptual distance needs the weight file of stlpips-pytorch==0.0.2, which is "
                "not installed. Install it without its dependencies: "
                "pip install --no-deps stlpips-pytorch==0.0.2"
            )
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.stages = stages
        for name in ("shift", "scale"):
            self.register_buffer(name, state[f"scaling_layer.{name}"])
        self.trunk = nn.ModuleList(_stage(state, i) for i in range(stages))
        for i in range(stages):
            self.register_buffer(f"weight_{i}", state[f"lin{i}.model.1.weight"])
        self.requires_grad_(False).eval()

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the unit-length features of each stage, (B, C_i, H_i, W_i)."""
        hidden = (images - self.shift) / self.scale
        found = []
        for i, convolutions in enumerate(self.trunk):
            if i:
                hidden = _blur_pool(hidden)
            hidden = convolutions(hidden)
            found.append(F.normalize(hidden, dim=1, eps=1e-6))
        return found

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return the distance per image, (B,); 0 for equal ones, about 1 for unrelated ones."""
        with torch.no_grad():
            expected = self.features(targets)
        total = images.new_zeros(len(images))
        for i, (a, b) in enumerate(zip(self.features(images), expected, strict=True)):
            weight = getattr(self, f"weight_{i}")
            total = total + ((a - b) ** 2 * weight).sum(1).mean((1, 2))
        return total


def _stage(state: dict[str, Tensor], index: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for key in _STAGES[index]:
        weight = state[f"net.slice{index + 1}.{key}.weight"]
        convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        convolution.weight.data = weight
        convolution.bias.data = state[f"net.slice{index + 1}.{key}.bias"]  # type: ignore[union-attr]
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)


def _blur_pool(x: Tensor) -> Tensor:
    """Max over 2×2 at stride 1, then a 3×3 binomial blur at stride 2 (arXiv:1904.11486)."""
    x = F.pad(F.max_pool2d(x, 2, stride=1), (1, 1, 1, 1), mode="reflect")
    row = torch.tensor([0.25, 0.5, 0.25], device=x.device, dtype=x.dtype)
    kernel = torch.outer(row, row).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, stride=2, groups=x.shape[1])


class PatchDiscriminator(nn.Module):
    """Map images (B, 3, H, W) to one logit per patch, (B, 1, h, w); above 0 means real.

    Args:
        width: channels after the first convolution; doubled at every further level.
        levels: halvings of the resolution; each patch covers about 2^(levels+2) pixels.
    """

    def __init__(self, width: int = 32, levels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for level in range(1, levels):
            before, after = width * 2 ** (level - 1), width * 2**level
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(width * 2 ** (levels - 1), 1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the judge: real above 1, reconstructed below −1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Loss of the decoder: be taken for real."""
    return -fake_logits.mean()
