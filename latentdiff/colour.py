"""sRGB ↔ CIELAB, and colours that no screen shows.

Lightness L, 0 … 100, depends only on the luminance Y; a and b say which colour, and are 0 for grey.
Images are (B, 3, H, W); sRGB in 0 … 1; white is D65.

Source: CIE 15:2004; IEC 61966-2-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Linear sRGB → XYZ.
_XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ],
    dtype=torch.float64,
)
#: Relative to white, which is R = G = B = 1.
_TO_XYZ = _XYZ / _XYZ.sum(1, keepdim=True)
_TO_LAB = torch.tensor([[0, 116, 0], [500, -500, 0], [0, 200, -200]], dtype=torch.float64)
_EDGE = 6 / 29


def to_lab(rgb: Tensor) -> Tensor:
    """CIELAB of sRGB, float64."""
    rgb = rgb.double()
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4, rgb / 12.92)
    xyz = _mix(_TO_XYZ, linear)
    root = torch.where(xyz > _EDGE**3, xyz.clamp(min=0) ** (1 / 3), xyz / (3 * _EDGE**2) + 4 / 29)
    lab = _mix(_TO_LAB, root)
    lab[:, 0] -= 16
    return lab


def to_srgb(lab: Tensor) -> Tensor:
    """sRGB of CIELAB, float64; outside 0 … 1 for colours that it does not have."""
    lab = lab.double().clone()
    lab[:, 0] += 16
    root = _mix(_TO_LAB.inverse(), lab)
    xyz = torch.where(root > _EDGE, root**3, (root - 4 / 29) * 3 * _EDGE**2)
    linear = _mix(_TO_XYZ.inverse(), xyz)
    curve = 1.055 * linear.clamp(min=0) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curve, 12.92 * linear)


def with_lightness(rgb: Tensor, lightness: Tensor) -> Tensor:
    """Colours of an image with another's lightness; chroma that does not fit is reduced.

    Args:    rgb: sRGB (B, 3, H, W).  lightness: L (B, 1, H, W).
    Returns: sRGB in 0 … 1, of exactly that L, hue and the largest chroma up to the image's own.
    """
    chroma = to_lab(rgb)[:, 1:]
    low, high = torch.zeros_like(chroma[:, :1]), torch.ones_like(chroma[:, :1])
    fits = _shown(lightness, chroma)
    for _ in range(16):  # bisection of the share of the chroma that fits; grey does
        middle = (low + high) / 2
        inside = _shown(lightness, middle * chroma)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    share = torch.where(fits, 1, low)
    return to_srgb(torch.cat([lightness.double(), share * chroma], 1)).clamp(0, 1)


def _shown(lightness: Tensor, chroma: Tensor) -> Tensor:
    rgb = to_srgb(torch.cat([lightness.double(), chroma], 1))
    return ((rgb >= -1e-6) & (rgb <= 1 + 1e-6)).all(1, keepdim=True)


def _mix(matrix: Tensor, channels: Tensor) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", matrix.to(channels.device), channels)
