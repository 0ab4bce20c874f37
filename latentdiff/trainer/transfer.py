"""Moving batches to the device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device; on a GPU through page-locked memory.

    CUDA copies asynchronously from page-locked memory only; from other memory the thread would
    stand still until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
