"""Time grids: at which noise levels a sampler stops.

Three spread the timesteps evenly (leading, trailing, linspace), two the noise levels r = σ/α

    karras:       r_i^{1/7} evenly from r_max to r_min    (Karras et al. 2022, eq. 5)
    exponential:  ln r_i evenly

align_your_steps takes levels optimised for Stable Diffusion (Sabour et al. 2024,
arXiv:2404.14507), and lcm the timesteps of a consistency distillation. Or give any list.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, choice_error, warn

Spacing = Literal[
    "leading", "trailing", "linspace", "karras", "exponential", "align_your_steps", "lcm"
]
SPACINGS: tuple[str, ...] = get_args(Spacing)
#: Other names of spacings.
SPACING_ALIASES = {"ays": "align_your_steps"}
GridStyle = Literal["whole", "real", "open"]

_KARRAS_RHO = 7.0
#: σ/α of the ten steps for Stable Diffusion 1.5, and the last level before the clean image.
_AYS_LEVELS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
#: Steps of the solver that latent consistency models are distilled from.
_LCM_STEPS = 50


def get_spacing(name: str) -> str:
    """The spacing of a name or alias, in any case. Raises: UserError: unknown."""
    wanted = str(name).lower().replace("-", "_").replace(" ", "_")
    wanted = SPACING_ALIASES.get(wanted, wanted)
    if wanted not in SPACINGS:
        raise choice_error("timestep_spacing", name, SPACINGS)
    return wanted


def usual_spacing(schedule: NoiseSchedule) -> str:
    """The spacing that suits a schedule."""
    return "trailing" if schedule.ends_in_pure_noise else "leading"


def timestep_grid(
    schedule: NoiseSchedule,
    n: int,
    spacing: str | None = None,
    steps_offset: int = 0,
    *,
    style: GridStyle = "whole",
) -> Tensor:
    """n decreasing timesteps for sampling, as diffusers spaces them.

    Args:    n: number of steps, 1 … T.
             spacing: leading (multiples of T//n, never reaches the last step), trailing (starts at
             the last step), linspace (both ends), karras, exponential, align_your_steps (ays) or
             lcm, see the module docstring. None: trailing where the schedule ends in pure noise
             (zero terminal SNR, flow), leading otherwise.
             steps_offset: added to a leading grid (1 in Stable Diffusion folders), as far as the
             last timestep allows.
             style: how diffusers' scheduler of the sampler reads leading and linspace: whole
             (DDIM), real (Euler: linspace is not rounded) or open (multistep: n + 1 points without
             the cleanest); see `Sampler.grid`.
    Returns: (n,) int64; float32 where timesteps are real: flow, karras, exponential, ays, and
             linspace of style real. Where the schedule ends in pure noise karras and exponential
             start there and spread the others from the noisiest finite level.
    Raises:  UserError: for n or spacing outside these, or one that does not suit the schedule.
    Source:  Lin et al. 2024, Table 2, arXiv:2305.08891.
    """
    total = schedule.num_train_timesteps
    spacing = get_spacing(usual_spacing(schedule) if spacing is None else spacing)
    most = _most_steps(total, spacing, style)
    if not 1 <= n <= most:
        raise UserError(
            f"the number of sampling steps must lie in 1 … {most} for {spacing} spacing; got {n}."
        )
    if spacing in ("karras", "exponential"):
        return _levels_grid(schedule, n, spacing)
    if spacing == "align_your_steps":
        return _align_your_steps(schedule, n)
    if schedule.is_flow:
        if spacing != "trailing":
            raise UserError(
                f"the flow schedule starts from pure noise, which {spacing} spacing does not "
                "reach. Use trailing, karras or exponential, or leave the spacing out."
            )
        return torch.linspace(total, total / n, n, dtype=torch.float64).float()
    if spacing == "lcm":
        return _lcm_grid(total, n)
    if spacing == "linspace" and style == "real":
        return torch.from_numpy(np.linspace(0, total - 1, n)[::-1].astype(np.float32).copy())
    return _even_grid(total, n, spacing, steps_offset, style)


def custom_grid(schedule: NoiseSchedule, timesteps: Sequence[float]) -> Tensor:
    """A list of timesteps as a grid: int64 if all are whole numbers, else float32.

    Raises:  UserError: not numbers, not strictly decreasing, or outside the schedule.
    """
    kinds = (int, float)
    if not isinstance(timesteps, Sequence) or not all(
        isinstance(t, kinds) and not isinstance(t, bool) for t in timesteps
    ):
        raise UserError(f"timesteps must be numbers; got {timesteps!r:.200}.")
    if not timesteps or any(low >= high for high, low in itertools.pairwise(timesteps)):
        raise UserError(
            f"timesteps must decrease strictly and not be empty; got {list(timesteps)!r:.200}."
        )
    low, high = schedule.clean_timestep, schedule.last_timestep
    if not low < timesteps[-1] <= timesteps[0] <= high:
        raise UserError(
            f"timesteps must lie above {low} (the clean image) and at most at {high}; "
            f"got {timesteps[0]} … {timesteps[-1]}."
        )
    whole = all(isinstance(t, int) for t in timesteps) and not schedule.is_flow
    return torch.tensor(list(timesteps), dtype=torch.int64 if whole else torch.float32)


def warn_of_late_start(schedule: NoiseSchedule, timesteps: Tensor) -> None:
    """Warn if sampling from pure noise starts where the network expects more image than noise.

    A single step of a leading or linspace grid is at the clean end; what is drawn there is noise.
    """
    if float(schedule.snr(timesteps[0])) > 1:
        warn(
            f"sampling starts at timestep {float(timesteps[0]):g}, where the network expects more "
            "image than noise, but from pure noise: the image will be noise. Start near "
            f"{schedule.last_timestep}: with trailing spacing, or with more steps."
        )


def _most_steps(total: int, spacing: str, style: str) -> int:
    if spacing == "lcm":
        return min(_LCM_STEPS, total)
    return total - 1 if style == "open" and spacing in ("leading", "linspace") else total


def _even_grid(total: int, n: int, spacing: str, steps_offset: int, style: str) -> Tensor:
    grid: np.ndarray
    points = n + 1 if style == "open" else n
    if spacing == "leading":
        step = total // points
        grid = np.arange(points)[::-1][:n] * step
        grid = grid + min(steps_offset, total - 1 - grid[0])
    elif spacing == "trailing":
        # numpy's rounding (half to even), so that every n gives the grid of diffusers.
        grid = np.round(np.arange(total, 0, -total / n))[:n] - 1
    else:
        grid = np.linspace(0, total - 1, points).round()[::-1][:n]
    return torch.from_numpy(grid.astype(np.int64))


def _levels_grid(schedule: NoiseSchedule, n: int, spacing: str) -> Tensor:
    """Noise ratios from the schedule's largest finite to its smallest, as real timesteps."""
    from_noise = schedule.ends_in_pure_noise
    start = schedule.last_timestep - 1 if from_noise else schedule.last_timestep
    high, low = (float(schedule.noise_ratio(t)) for t in (start, schedule.clean_timestep + 1))
    count = n - 1 if from_noise else n
    if spacing == "karras":
        ends = high ** (1 / _KARRAS_RHO), low ** (1 / _KARRAS_RHO)
        ratios = np.linspace(*ends, count) ** _KARRAS_RHO
    else:
        ratios = np.exp(np.linspace(math.log(high), math.log(low), count))
    return _at_ratios(schedule, [math.inf, *ratios] if from_noise else list(ratios))


def _align_your_steps(schedule: NoiseSchedule, n: int) -> Tensor:
    """The published levels for n = 10; for other n interpolated in ln r."""
    if schedule.ends_in_pure_noise:
        raise UserError(
            "align_your_steps was found for schedules like Stable Diffusion's, which keep a little "
            "of the image at the last step; this one ends in pure noise. Use trailing spacing."
        )
    ends = torch.tensor([schedule.clean_timestep + 1, schedule.last_timestep])
    low, high = schedule.noise_ratio(ends).tolist()
    if high < 0.999 * _AYS_LEVELS[0] or low > 1.01 * _AYS_LEVELS[-1]:  # Stable Diffusion's fit
        raise UserError(
            "align_your_steps was found for schedules like Stable Diffusion's, with noise ratios "
            f"from {_AYS_LEVELS[-1]} to {_AYS_LEVELS[0]:.1f}; this one has {low:.3g} to "
            f"{high:.3g}. Use leading, trailing or karras spacing."
        )
    places = np.linspace(0, len(_AYS_LEVELS) - 1, n + 1)[:-1]
    logs = np.interp(places, np.arange(len(_AYS_LEVELS)), np.log(_AYS_LEVELS))
    return _at_ratios(schedule, [float(r) for r in np.exp(logs)])


def _at_ratios(schedule: NoiseSchedule, ratios: list[float]) -> Tensor:
    # The ends may leave the schedule by a rounding; below its first level no network was trained.
    low, high = float(schedule.clean_timestep + 1), float(schedule.last_timestep)
    most = float(schedule.noise_ratio(high))
    found = [schedule.timestep_at(min(float(r), most)) for r in ratios]
    return torch.tensor([min(max(t, low), high) for t in found], dtype=torch.float32)


def _lcm_grid(total: int, n: int) -> Tensor:
    """Timesteps of the distillation (every T/50th), n of them from the last, evenly by index."""
    steps = min(_LCM_STEPS, total)
    distilled = (np.arange(1, steps + 1) * (total // steps) - 1)[::-1]
    chosen = np.floor(np.linspace(0, steps, n, endpoint=False)).astype(np.int64)
    return torch.from_numpy(distilled[chosen].astype(np.int64))
