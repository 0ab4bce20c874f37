"""Which 16-bit arithmetic a machine is fast at."""

from __future__ import annotations

import torch


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 products are faster than float32's on a device.

    A CPU without AVX512-BF16 or AMX computes them by conversion, tens of times slower; of CPUs that
    are not x86 nothing is known, so the answer is no.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind == "xpu"


def resolve_precision(wanted: str, device: torch.device | str) -> str:
    """Turn `auto` into what the device is fast at: bf16 or no; other words stay as they are."""
    if wanted != "auto":
        return wanted
    return "bf16" if has_fast_bf16(device) else "no"
