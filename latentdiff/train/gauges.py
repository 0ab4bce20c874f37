"""What is read beside the loss at each log point: use of the hardware's arithmetic and memory.

    MFU = images/s · FLOPs per image / (peak FLOPs per second · devices)

the model FLOPs utilisation. FLOPs per image are those of the U-Net's forward and backward pass,
counted once at the start on the meta device, where nothing is computed: matrix products,
convolutions and attention, a multiplication and an addition counting as two. What gradient
checkpointing computes again does not count. The peak is the data sheet's (dense) for known GPUs;
elsewhere it is measured with a matrix product, so there 100 % is what this machine does at its
best.

Source: Chowdhery et al. 2022, appendix B, arXiv:2204.02311.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from accelerate import Accelerator

    from latentdiff.formats.folder import Components
    from latentdiff.train.latents import Latents

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


def make_gauges(
    components: Components, latents: Latents, accelerator: Accelerator, frozen: bool = False
) -> Gauges:
    """Count the U-Net's FLOPs and find the machine's, once.

    Args:    frozen: the U-Net's own weights get no gradient.
    """
    channels, height, width = latents.data.shape
    tokens = components.text_encoder.max_length
    flops = count_flops(components.unet, (channels // 2, height, width), tokens, frozen)
    peak = peak_flops(accelerator.device, accelerator.mixed_precision)
    return Gauges(accelerator.device, flops, peak * accelerator.num_processes)


#: Dense peak in TFLOP/s by name: 16 bit with tensor cores, and 32 bit without.
PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}


def count_flops(
    unet: UNet, latent_shape: tuple[int, ...], tokens: int, frozen: bool = False
) -> int:
    """FLOPs of the forward and backward pass for one image.

    Args:   latent_shape: (C, h, w).  tokens: positions of the context.
            frozen: gradients pass through the weights, and the weights themselves get none.
    """
    with torch.device("meta"):
        twin = UNet(unet.config).requires_grad_(not frozen)
        x_t = torch.empty(1, *latent_shape, requires_grad=frozen)
        context = torch.empty(1, tokens, unet.config.cross_attention_dim)
        t = torch.zeros(1)
    return count_module_flops(twin, x_t, t, context)


def count_module_flops(module: nn.Module, *inputs: Any) -> int:
    """FLOPs of module(*inputs), forward and backward, whatever device they are on."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs).sum().backward()
    return int(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> float:
    """Floating-point operations per second that one device can do.

    Args:   precision: bf16, fp16 or no (32 bit).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, single) in PEAKS.items():
            if known in name:
                return 1e12 * (single if precision == "no" else half)
    return measured_peak(device, precision)


def measured_peak(device: torch.device, precision: str, size: int | None = None) -> float:
    """The best of five matrix products of the given width."""
    width = size or (384 if device.type == "cpu" else 4096)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a = torch.ones(width, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * width**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
