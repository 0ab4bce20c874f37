"""Samplers as plain generators: from pure noise to an image, one yield per step.

A sampler sees only a denoiser (x_t, t) -> x_0; prediction type and guidance live inside it. It
keeps no state between calls. With s the next, cleaner timestep of the grid,

    ddpm:  x_s ~ q(x_s | x_t, x_0)                              (Ho et al. 2020, Algorithm 2)
    ddim:  x_s = α_s x_0 + √(σ_s² − η²V) ε + η√V z              (Song et al. 2021, eq. 12 and 16)

where V is the variance of q(x_s | x_t, x_0). Both hold for any (α, σ), rectified flow included.
A new sampler is one generator function and one row of SAMPLERS.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.guidance import Predict
from latentdiff.diffusion.posterior import posterior_coefficients
from latentdiff.diffusion.prediction import check_prediction, to_x_0
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, choice_error, did_you_mean

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


class SamplerState(NamedTuple):
    """What a sampler yields after each step."""

    step: int
    """0 … n−1."""
    t: float
    """The timestep just left."""
    x_t: Tensor
    """The state arrived at, (B, C, H, W); after the last step, the result."""
    x_0: Tensor
    """This step's estimate of the clean image, (B, C, H, W), clipped if asked."""


def as_denoiser(predict: Predict, schedule: NoiseSchedule, prediction: str) -> Denoiser:
    """Wrap a network (x_t, t) -> y, guided or not, so that it answers with x_0.

    The denoiser takes t as a (B,) CPU tensor and hands the network a copy on x_t's device.
    Raises:  UserError: for a prediction that the schedule cannot turn into x_0.
    """
    check_prediction(prediction, schedule.config)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        y = predict(x_t, t.to(x_t.device))
        return to_x_0(prediction, y.to(x_t.dtype), x_t, schedule.alpha(t), schedule.sigma(t))

    return denoise


def make_denoiser(
    model: Callable[[Tensor, Tensor, Any], Tensor],
    context: Any,
    schedule: NoiseSchedule,
    prediction: str,
) -> Denoiser:
    """`as_denoiser` for a network model(x_t, t, context) without guidance."""
    return as_denoiser(lambda x_t, t: model(x_t, t, context), schedule, prediction)


Spacing = Literal["leading", "trailing", "linspace"]


def timestep_grid(
    schedule: NoiseSchedule, n: int, spacing: Spacing | None = None, steps_offset: int = 0
) -> Tensor:
    """n decreasing timesteps for sampling, as diffusers spaces them.

    Args:    n: number of steps, 1 … T.
             spacing: leading (multiples of T//n, never reaches the last step), trailing (starts at
             the last step) or linspace (both ends). None: trailing where the schedule ends in pure
             noise (zero terminal SNR, flow), leading otherwise. Flow allows trailing only.
             steps_offset: added to a leading grid (1 in Stable Diffusion folders), as far as the
             last timestep allows.
    Returns: (n,) int64; float32 for flow, from T down to T/n in equal steps.
    Raises:  UserError: for n or spacing outside these.
    Source:  Lin et al. 2024, Table 2, arXiv:2305.08891.
    """
    total = schedule.num_train_timesteps
    if spacing is None:
        spacing = "trailing" if schedule.ends_in_pure_noise else "leading"
    if spacing not in get_args(Spacing):
        raise choice_error("timestep spacing", spacing, get_args(Spacing))
    if not 1 <= n <= total:
        raise UserError(f"the number of sampling steps must lie in 1 … {total}; got {n}.")
    if schedule.is_flow:
        if spacing != "trailing":
            raise UserError(
                f"the flow schedule starts from pure noise, which only trailing spacing reaches; "
                f"got {spacing!r}. Use trailing, or leave the spacing out."
            )
        return torch.linspace(total, total / n, n, dtype=torch.float64).float()
    grid: np.ndarray
    if spacing == "leading":
        step = total // n
        grid = np.arange(n)[::-1] * step + min(steps_offset, total - 1 - (n - 1) * step)
    elif spacing == "trailing":
        # numpy's rounding (half to even), so that every n gives the grid of diffusers.
        grid = np.round(np.arange(total, 0, -total / n))[:n] - 1
    else:
        grid = np.linspace(0, total - 1, n).round()[::-1]
    return torch.from_numpy(grid.astype(np.int64))


def ddpm(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[float],
    noise: Noise,
    *,
    clip: float | None = None,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> Iterator[SamplerState]:
    """Ancestral sampling: draw x_s from q(x_s | x_t, x_0) with the estimated x_0.

    On a grid with gaps the step's own α_t/α_s takes the place of α_t. The last step adds no noise.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_T: (B, C, H, W) standard normal.
             timesteps: decreasing, see `timestep_grid`.  noise: step -> (B, C, H, W).
             clip: bound |x_0| by this.
             variance: fixed_small (the posterior's) or fixed_large (β of the step).
    Source:  Ho et al. 2020, Algorithm 2 and section 3.2, arXiv:2006.11239.
    """
    if variance not in ("fixed_small", "fixed_large"):
        raise choice_error("variance", variance, ("fixed_small", "fixed_large"))
    x = x_T
    for step, t, s, last in _pairs(schedule, timesteps, schedule.clean_timestep):
        x_0 = _clipped(denoiser(x, _batched(t, x)), clip)
        weight_x_0, weight_x_t, spread = map(float, posterior_coefficients(schedule, s, t))
        if variance == "fixed_large":
            spread = float(schedule.transition(s, t)[1])
        x = weight_x_0 * x_0 + weight_x_t * x
        if not last:
            x = x + spread**0.5 * noise(step)
        yield SamplerState(step, t, x, x_0)


def ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    final_timestep: int | None = None,
) -> Iterator[SamplerState]:
    """Implicit sampling: the same marginals with less or no noise; first order in the step.

    Args:    denoiser, x_T, timesteps, noise: as for `ddpm`; noise is asked only when eta > 0.
             eta: 0 deterministic … 1 as noisy as ddpm.
             clip: bound |x_0| by this; ε stays that of the unclipped estimate, as in diffusers.
             final_timestep: where the last step leads. None: the clean image; 0: the first noise
             level, which is diffusers' set_alpha_to_one=False of Stable Diffusion folders.
    Source:  Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta must lie in 0 … 1; got {eta}.")
    end = schedule.clean_timestep if final_timestep is None else final_timestep
    x = x_T
    for step, t, s, _ in _pairs(schedule, timesteps, end):
        x_0 = denoiser(x, _batched(t, x))
        eps = (x - float(schedule.alpha(t)) * x_0) / float(schedule.sigma(t))
        x_0 = _clipped(x_0, clip)
        spread = eta**2 * float(posterior_coefficients(schedule, s, t)[2])
        direction = max(float(schedule.sigma(s)) ** 2 - spread, 0.0) ** 0.5
        x = float(schedule.alpha(s)) * x_0 + direction * eps
        if spread > 0:
            x = x + spread**0.5 * noise(step)
        yield SamplerState(step, t, x, x_0)


@dataclass(frozen=True)
class Sampler:
    """One row of SAMPLERS."""

    function: Callable[..., Iterator[SamplerState]]
    """The generator function."""
    summary: str
    """One phrase for help texts."""
    aliases: tuple[str, ...] = ()
    """Other names, among them the class of diffusers' scheduler."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that the function takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, "ancestral sampling, new noise at every step", ("DDPMScheduler",)),
    "ddim": Sampler(ddim, "deterministic, good from about 20 steps", ("DDIMScheduler",)),
}


def get_sampler(name: str) -> Sampler:
    """The row of a sampler by its name or an alias, in any case.

    Raises:  UserError: for an unknown name, with the near miss.
    """
    wanted = name.lower()
    for key, row in SAMPLERS.items():
        if wanted in (key, *(alias.lower() for alias in row.aliases)):
            return row
    raise choice_error("sampler", name, SAMPLERS)


def run(
    name: str,
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[float],
    noise: Noise,
    **options: Any,
) -> Iterator[SamplerState]:
    """The states of a sampler chosen by name, for previews and progress bars.

    Raises:  UserError: unknown name, or an option that this sampler does not take.
    """
    row = get_sampler(name)
    for option in options:
        if option not in row.options:
            raise UserError(
                f"sampler {name} takes the options {', '.join(row.options)}; got {option!r}."
                + did_you_mean(option, row.options)
            )
    return row.function(denoiser, x_T, schedule, timesteps, noise, **options)


def sample(
    name: str,
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor | Sequence[float],
    noise: Noise,
    **options: Any,
) -> Tensor:
    """Run a sampler to its end and give the last state, (B, C, H, W)."""
    x = x_T
    for state in run(name, denoiser, x_T, schedule, timesteps, noise, **options):
        x = state.x_t
    return x


def _pairs(
    schedule: NoiseSchedule, timesteps: Tensor | Sequence[float], end: float
) -> Iterator[tuple[int, float, float, bool]]:
    """(step, t, next timestep s, whether this is the last step)."""
    given = torch.as_tensor(timesteps)
    # Rounded to what the denoiser will be given, so that both look up the same level.
    grid = (given.float() if given.is_floating_point() else given).tolist()
    if not grid or any(low >= high for high, low in itertools.pairwise(grid)):
        raise UserError(f"timesteps must decrease strictly and not be empty; got {grid[:8]} …")
    if end > grid[-1]:
        raise UserError(f"final_timestep must be at most the last timestep {grid[-1]}; got {end}.")
    following = [*grid[1:], end]
    for step, (t, s) in enumerate(zip(grid, following, strict=True)):
        yield step, t, s, step == len(grid) - 1


def _batched(t: float, x: Tensor) -> Tensor:
    """t once per image, on the CPU: the tables are there, and a GPU need not be waited for."""
    return torch.full((len(x),), t, dtype=torch.int64 if isinstance(t, int) else torch.float32)


def _clipped(x_0: Tensor, clip: float | None) -> Tensor:
    return x_0 if clip is None else x_0.clamp(-clip, clip)
