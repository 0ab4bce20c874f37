"""What is read beside the loss at each log point: use of arithmetic and of memory."""

from __future__ import annotations

import sys

import torch

MEBI = 2**20


class Gauges:
    """Reads the machine; the counting and measuring was done before.

    Args:
        device: where the model is.
        flops_per_image: forward and backward.
        peak: floating-point operations per second of all processes' devices together.
    """

    def __init__(self, device: torch.device, flops_per_image: float, peak: float) -> None:
        self._device, self._flops, self._peak = device, flops_per_image, peak

    def __call__(self, images_per_second: float) -> dict[str, float]:
        """Return `mfu` (0 … 1) and `peak_memory_mb` (of this process since its start)."""
        return {
            "mfu": round(images_per_second * self._flops / self._peak, 4),
            "peak_memory_mb": round(peak_memory(self._device) / MEBI, 1),
        }


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
