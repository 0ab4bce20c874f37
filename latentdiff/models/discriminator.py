"""A patch discriminator: judges every patch of a picture as real or reconstructed.

Source: Isola et al. 2017, arXiv:1611.07004; hinge loss as in VQGAN, Esser et al. 2021,
arXiv:2012.09841.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Module):
    """Map pictures (B, 3, H, W) to one logit per patch, (B, 1, h, w); above 0 means real.

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
