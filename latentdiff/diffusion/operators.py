"""Degradations as linear operators y = A x on images: what is left of an image, and the way back.

Each has `apply` (A), `adjoint` (Aᵀ, with ⟨A x, y⟩ = ⟨x, Aᵀ y⟩) and `pseudo_inverse` (A⁺, with
A A⁺ A = A: an image that gives y). Images are (B, C, H, W) in [−1, 1]. A new degradation is one
class.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

#: ITU-R BT.601, of gamma-encoded values: the grey of JPEG, Pillow and television.
LUMA = (0.299, 0.587, 0.114)


class Operator(ABC):
    """y = A x."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""

    @abstractmethod
    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A⁺ y."""

    def correction(self, y: Tensor) -> Tensor:
        """A step by which A x becomes more like y, and small errors of y do not grow."""
        return self.pseudo_inverse(y)


class Identity(Operator):
    """Nothing is lost; what there is to remove is noise."""

    def apply(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return y


@dataclass(frozen=True)
class Mask(Operator):
    """Only some pixels are known."""

    known: Tensor
    """1 where they are, 0 elsewhere; broadcasts to (B, C, H, W)."""

    def apply(self, x: Tensor) -> Tensor:
        return self.known.to(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        return self.apply(y)


@dataclass(frozen=True)
class Grey(Operator):
    """Only a weighted mean of the colours is known: (B, 3, H, W) → (B, 1, H, W)."""

    weights: tuple[float, ...] = LUMA

    def _column(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights).to(like)[:, None, None]

    def apply(self, x: Tensor) -> Tensor:
        return (self._column(x) * x).sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._column(y) * y

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        w = self._column(y)
        return w * y / w.square().sum()


@dataclass(frozen=True)
class Separable(Operator):
    """One matrix for the columns and one for the rows: Y = R X Cᵀ in every channel.

    An inverse of a Kronecker product is that of its factors: X = R⁺ Y (C⁺)ᵀ.
    """

    rows: Tensor
    """(h, H)"""
    columns: Tensor
    """(w, W)"""
    inverse: Callable[[Tensor], Tensor] = torch.linalg.pinv
    """Of such a matrix."""

    def apply(self, x: Tensor) -> Tensor:
        return self.rows.to(x) @ x @ self.columns.to(x).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return self.rows.to(y).mT @ y @ self.columns.to(y)

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor]:
        return self.inverse(self.rows), self.inverse(self.columns)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        rows, columns = self._inverses
        return rows.to(y) @ y @ columns.to(y).mT


class Blur(Separable):
    """Gaussian blur; beyond its edges the image goes on mirrored."""

    def __init__(self, size: tuple[int, int], sigma: float) -> None:
        """Args: size: (H, W).  sigma: the Gaussian's standard deviation, pixels."""
        rows, columns = (_blur_matrix(side, sigma) for side in size)
        super().__init__(rows, columns)

    def correction(self, y: Tensor) -> Tensor:
        return self.adjoint(y)  # no singular value is above 1, and many are near 0


class Downsample(Separable):
    """Each pixel is the mean over the area that it covers, in parts where the edges cut pixels.

    Of the images with these means, A⁺ gives a smooth one: S Aᵀ (A S Aᵀ)⁻¹ y with a Gaussian S.
    """

    def __init__(self, size: tuple[int, int], smaller: tuple[int, int]) -> None:
        """Args: size: (H, W).  smaller: (h, w), at most as large."""
        rows, columns = (_area_matrix(*sides) for sides in zip(size, smaller, strict=True))
        super().__init__(rows, columns, _smooth_inverse)


def _smooth_inverse(areas: Tensor) -> Tensor:
    few, many = areas.shape
    smooth = areas @ _blur_matrix(many, many / few / 2)
    return torch.linalg.solve(smooth @ areas.mT, smooth).mT


def _blur_matrix(side: int, sigma: float) -> Tensor:
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (offsets.double() / sigma).square()).exp()
    # Mirrored with the edge pixel doubled, so that the matrix is symmetric.
    at = (torch.arange(side)[:, None] + offsets) % (2 * side)
    at = torch.minimum(at, 2 * side - 1 - at)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, at, (kernel / kernel.sum()).expand(side, -1).contiguous())


def _area_matrix(side: int, smaller: int) -> Tensor:
    edges = torch.arange(smaller + 1, dtype=torch.float64) * (side / smaller)
    pixels = torch.arange(side, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * (smaller / side)


#: Of quality 50, in the standard's Annex K: brightness, then colour.
_BRIGHTNESS = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_COLOUR = (
    """17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99"""
    + " 99" * 32
)
#: Side of a cell of the transform, and of the area that a cell of colours covers.
_CELL, _UNIT = 8, 16
#: RGB → YCbCr, of differences from the middle grey (JFIF).
_YCBCR = torch.tensor(
    [LUMA, (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)], dtype=torch.float64
)


class Jpeg(Operator):
    """JPEG before it rounds: y holds each coefficient in units of its quantization step.

    RGB → YCbCr, colour averaged over 2×2 pixels, an orthonormal cosine transform of each 8×8 cell,
    divided by the step. All this is linear. A file keeps the nearest whole numbers, so it tells
    each coefficient to ±½ (`measure`), a deviation of about `NOISE`.

    Source: ITU-T T.81 and JFIF 1.02; the tables as libjpeg scales them.
    """

    #: Sides of images must be multiples of it.
    MULTIPLE = _UNIT
    #: Of values spread evenly over ±½.
    NOISE = 12**-0.5

    def __init__(self, size: tuple[int, int], quality: int) -> None:
        """Args: size: (H, W).  quality: 1 … 100, as libjpeg and Pillow count."""
        percent = 5000 // quality if quality < 50 else 200 - 2 * quality
        tables = torch.tensor([[int(q) for q in text.split()] for text in (_BRIGHTNESS, _COLOUR)])
        # In units of x, which spans 2 where a file spans 255.
        steps = ((tables * percent + 50) // 100).clamp(1, 255).view(2, _CELL, _CELL) / 127.5
        k = torch.arange(_CELL, dtype=torch.float64)
        cosines = ((2 * k + 1) * k[:, None] * math.pi / (2 * _CELL)).cos() / 2
        cosines[0] /= 2**0.5
        self._planes = [
            (torch.block_diag(*[cosines] * h), torch.block_diag(*[cosines] * w), table.repeat(h, w))
            for h, w, table in zip(*((s // _CELL, s // _UNIT) for s in size), steps, strict=True)
        ]

    def apply(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 1.5·H·W): all of the brightness, then the colours."""
        ycc = torch.einsum("ij,bjhw->bihw", _YCBCR.to(x), x)
        both = zip((ycc[:, :1], F.avg_pool2d(ycc[:, 1:], 2)), self._planes, strict=True)
        return torch.cat(
            [(r.to(x) @ p @ c.to(x).mT / q.to(x)).flatten(1) for p, (r, c, q) in both], 1
        )

    def adjoint(self, y: Tensor) -> Tensor:
        brightness, colour = self._planes_of(y, -1)
        return self._to_rgb(_YCBCR.mT, brightness, colour / 4)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """What a decoder shows, but for clipping."""
        return self._to_rgb(_YCBCR.inverse(), *self._planes_of(y, 1))

    def measure(self, x: Tensor) -> Tensor:
        """The y that the file of an image stands for."""
        off = self.apply(torch.full_like(x, 0.5 / 127.5))  # files count from 128, not from 127.5
        return (self.apply(x) - off).round() + off

    def _planes_of(self, y: Tensor, power: int) -> list[Tensor]:
        """Brightness and colours, with coefficients times their steps to a power."""
        found = []
        for (r, c, q), part in zip(self._planes, self._split(y), strict=True):
            cells = part.view(len(y), -1, *q.shape) * q.to(y) ** power
            found.append(r.to(y).mT @ cells @ c.to(y))
        return found

    def _split(self, y: Tensor) -> list[Tensor]:
        first = self._planes[0][2].numel()
        return [y[:, :first], y[:, first:]]

    @staticmethod
    def _to_rgb(matrix: Tensor, brightness: Tensor, colour: Tensor) -> Tensor:
        full = colour.repeat_interleave(2, -2).repeat_interleave(2, -1)
        return torch.einsum("ij,bjhw->bihw", matrix.to(full), torch.cat([brightness, full], 1))
