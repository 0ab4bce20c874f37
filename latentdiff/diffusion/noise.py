"""Random numbers that depend on what they are for, never on the batch or the device.

Each image (or training sample) has its own seed and its own CPU generator, so element i of a
batch is the same bits whatever stands beside it and wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(seed: int, index: int) -> int:
    """Hash (seed, index) to 64 well-spread bits: neighbours share no pattern.

    torch's CPU generator keeps the low 32 of them, so among n streams about n²/2³³ pairs coincide.
    Source:  the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
    """
    bits = _splitmix(seed & _MASK)
    return _splitmix((bits + index) & _MASK)


def image_noise(seed: int, shape: Sequence[int], step: int | None = None) -> Tensor:
    """Standard normal noise of one image.

    Args:    seed: the image's own seed.  shape: (C, H, W).
             step: None for the initial x_T, which is `torch.randn` under `manual_seed(seed)`;
             otherwise the sampler's step number (0, 1, …), whose noise is independent of x_T.
    Returns: float32 CPU tensor of that shape.
    """
    state = seed if step is None else mix(seed, step)
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(state))


def batch_noise(seeds: Sequence[int], shape: Sequence[int], step: int | None = None) -> Tensor:
    """`image_noise` of several images, stacked to (B, C, H, W) on the CPU."""
    return torch.stack([image_noise(seed, shape, step) for seed in seeds])


def step_noise(
    seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Callable[[int], Tensor]:
    """The `noise` argument of a sampler: step number -> (B, C, H, W) on `device`."""
    return lambda step: batch_noise(seeds, shape, step).to(device)


def slerp(first: Tensor, second: Tensor, w: float) -> Tensor:
    """What lies at the share w of the way along the great circle from one noise to another.

    Its norm is between theirs, while that of a straight line's middle is less. Equal ones stay.
    Source:  Shoemake 1985, doi:10.1145/325334.325242.
    """
    cosine = (first * second).sum() / (first.norm() * second.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.lerp(first, second, w)
    return (((1 - w) * angle).sin() * first + (w * angle).sin() * second) / angle.sin()


def coarse_levels(shape: Sequence[int]) -> list[tuple[int, int, int]]:
    """The shapes of the coarser octaves of (C, H, W): each half the one before, down to one row."""
    channels, height, width = shape
    levels = []
    while min(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
        levels.append((channels, height, width))
    return levels


def multi_resolution(fine: Tensor, coarse: Sequence[Tensor], share: float) -> Tensor:
    """White noise with coarser octaves of itself added, of variance 1 at every position.

        ε = Σ_k s^k U_k(n_k) / √(Σ_k s^{2k}),    U_k the enlargement to full size, n_0 = fine

    The large shapes and the mean colour of an image then have to be found from noise too, which
    white noise hardly touches there.

    Args:    fine: (B, C, H, W).  coarse: (B, C, h, w) each, see `coarse_levels`.
             share: s, how much each octave adds to the next finer one.
    Source:  Whitaker 2023, "Multi-resolution noise for diffusion model training" (Weights & Biases
             report); there scaled by the measured deviation, here by the exact one.
    """
    if not coarse:
        return fine
    total, power, weight = fine, 1.0, 1.0
    for level in coarse:
        weight *= share
        # Nearest enlargement repeats values, so each position keeps variance 1.
        total = total + weight * torch.nn.functional.interpolate(level, size=fine.shape[-2:])
        power += weight**2
    return total / power**0.5


def _splitmix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
