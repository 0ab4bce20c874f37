"""Shape and precision of the per-sample coefficients that multiply images."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample(values: Tensor | float, like: Tensor) -> Tensor | float:
    """Make (B,) coefficients multiply a (B, C, H, W) tensor.

    Args:    values: (B,) or 0-d tensor, any device; a plain number passes through.
             like: the tensor to be multiplied; gives device and number of dimensions.
    Returns: (B, 1, 1, 1) tensor, at least float32 (float64 where `like` is float64).
    """
    if not isinstance(values, Tensor):
        return values
    dtype = torch.promote_types(like.dtype, torch.float32)
    values = values.to(dtype).to(like.device, non_blocking=True)
    return (
        values.reshape(values.shape + (1,) * (like.ndim - values.ndim)) if values.ndim else values
    )
