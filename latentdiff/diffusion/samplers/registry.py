"""The samplers by name, and running one, with the estimate of x_0 kept in range if asked.

A new sampler is one generator function in `solvers`, one row of SAMPLERS and its name in the help
of cli/generate.py; docs/diffusion.md has an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import Denoiser
from latentdiff.diffusion.samplers import solvers
from latentdiff.diffusion.samplers.grids import GridStyle
from latentdiff.diffusion.samplers.step import Bound, Noise, SamplerState, Steps, Timesteps
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError, choice_error, did_you_mean

#: Options that every sampler takes, see `run`.
COMMON = ("final_timestep", "clip", "threshold")


@dataclass(frozen=True)
class Sampler:
    """One row of SAMPLERS."""

    function: Callable[..., Iterator[SamplerState]]
    """The generator function."""
    aliases: tuple[str, ...] = ()
    """Other names: the class of diffusers' scheduler, and what A1111 and ComfyUI call it."""
    grid: GridStyle = "whole"
    """How diffusers' scheduler reads leading and linspace spacing, see `timestep_grid`."""
    last_level: Literal["set_alpha_to_one", "final_sigmas_type"] | None = None
    """The field of diffusers' scheduler that says whether it ends at the clean image; it has none
    for the others, which do."""
    spacing: str | None = None
    """The grid it wants when none is chosen; None: what suits the schedule."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that the sampler takes."""
        parameters = inspect.signature(self.function).parameters.values()
        own = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        return (*(name for name in own if name != "bound"), *COMMON)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(solvers.ddpm, ("DDPMScheduler",)),
    "ddim": Sampler(solvers.ddim, ("DDIMScheduler",), last_level="set_alpha_to_one"),
    "euler": Sampler(
        solvers.euler,
        ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "k_euler"),
        grid="real",
        last_level="final_sigmas_type",
    ),
    "euler_ancestral": Sampler(
        solvers.euler_ancestral,
        ("EulerAncestralDiscreteScheduler", "Euler a", "k_euler_a"),
        grid="real",
    ),
    "heun": Sampler(
        solvers.heun,
        ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "k_heun"),
        grid="real",
    ),
    "dpmpp_2m": Sampler(
        solvers.dpmpp_2m,
        ("DPMSolverMultistepScheduler", "DPM++ 2M", "dpm++_2m"),
        grid="open",
        last_level="final_sigmas_type",
    ),
    "dpmpp_2m_sde": Sampler(
        solvers.dpmpp_2m_sde,
        ("DPM++ 2M SDE", "dpm++_2m_sde"),
        grid="open",
        last_level="final_sigmas_type",
    ),
    "dpmpp_2s_ancestral": Sampler(
        solvers.dpmpp_2s_ancestral, ("DPM++ 2S a", "DPM++ 2S ancestral", "dpm++_2s_a"), grid="real"
    ),
    "unipc": Sampler(
        solvers.unipc,
        ("UniPCMultistepScheduler", "uni_pc", "uni_pc_bh2"),
        grid="open",
        last_level="final_sigmas_type",
    ),
    "lms": Sampler(solvers.lms, ("LMSDiscreteScheduler", "k_lms"), grid="real"),
    "pndm": Sampler(solvers.pndm, ("PNDMScheduler", "PLMS"), last_level="set_alpha_to_one"),
    "lcm": Sampler(solvers.lcm, ("LCMScheduler", "FlowMatchLCMScheduler"), spacing="lcm"),
}


def get_sampler(name: str) -> Sampler:
    """The row of a sampler by its name or an alias, in any case.

    Raises:  UserError: for an unknown name, with the near miss.
    """
    return SAMPLERS[sampler_name(name)]


def sampler_name(name: str) -> str:
    """The key in SAMPLERS of a name or an alias, in any case.

    Raises:  UserError: for an unknown name, with the near miss.
    """
    wanted = _plain(name)
    for key, row in SAMPLERS.items():
        if wanted in (key, *map(_plain, row.aliases)):
            return key
    raise choice_error("sampler", name, SAMPLERS)


def split_name(name: str) -> tuple[str, str | None]:
    """(key in SAMPLERS, spacing) of names that carry both, like A1111's "DPM++ 2M Karras".

    Raises:  UserError: for an unknown name, with the near miss.
    """
    for spacing in ("karras", "exponential"):
        plain = _plain(name)
        if plain.endswith(f"_{spacing}"):
            return sampler_name(plain.removesuffix(f"_{spacing}")), spacing
    return sampler_name(name), None


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse an option that a sampler does not take. Raises: UserError: with the near miss."""
    allowed = get_sampler(name).options
    for option in options:
        if option not in allowed:
            raise UserError(
                f"sampler {name} takes the options {', '.join(allowed)}; got {option!r}."
                + did_you_mean(option, allowed)
            )


def run(
    name: str,
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    *,
    final_timestep: float | None = None,
    clip: float | None = None,
    threshold: float | None = None,
    after: SamplerState | None = None,
    **options: Any,
) -> Iterator[SamplerState]:
    """The states of a sampler chosen by name, for previews and progress bars.

    Args:    denoiser: (x_t, t (B,)) -> x_0.  x_T: (B, C, H, W).  timesteps: decreasing.
             noise: step -> (B, C, H, W).  final_timestep, after: see `Steps`.
             clip: bound |x_0| by this.
             threshold: 0 … 1, dynamic thresholding at this fraction of each image's values.
             options: the sampler's own.
    Raises:  UserError: unknown name, or an option that this sampler does not take.
    """
    row, bound = get_sampler(name), bound_of(clip, threshold)
    check_options(name, options)
    if "bound" in inspect.signature(row.function).parameters:
        options["bound"] = bound
    elif bound is not None:
        denoiser = _bounded(denoiser, bound)
    steps = Steps(schedule, timesteps, final_timestep, after)
    return row.function(denoiser, x_T, steps, noise, **options)


def resume(
    name: str,
    state: SamplerState,
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    **options: Any,
) -> Iterator[SamplerState]:
    """The states after `state`, the same bits as in the run that yielded it.

    A one-step sampler needs x_t alone; a multistep one also its earlier estimates, which
    `state.history` holds. Both are tensors and numbers: a state may be saved, or sent elsewhere.

    Args:    name, denoiser, schedule, timesteps, noise, options: as given to `run`.
    """
    return run(name, denoiser, state.x_t, schedule, timesteps, noise, after=state, **options)


def sample(
    name: str,
    denoiser: Denoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    noise: Noise,
    **options: Any,
) -> Tensor:
    """Run a sampler to its end and give the last state, (B, C, H, W)."""
    x = x_T
    for state in run(name, denoiser, x_T, schedule, timesteps, noise, **options):
        x = state.x_t
    return x


def bound_of(clip: float | None, threshold: float | None) -> Bound | None:
    """What keeps the estimate of the clean image in range; None: nothing does.

    Args:    clip: bound |x_0| by this.  threshold: 0 … 1, the fraction of `dynamic_threshold`.
    Raises:  UserError: both, or one out of range.
    """
    if clip is None and threshold is None:
        return None
    if clip is not None and threshold is not None:
        raise UserError("clip and threshold both bound x_0; give one of them.")
    if threshold is not None:
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must lie in 0 … 1, 0.995 usual; got {threshold}.")
        return lambda x_0: dynamic_threshold(x_0, threshold)
    if not clip or clip < 0:
        raise UserError(f"clip must be above 0; got {clip}.")
    return lambda x_0: x_0.clamp(-clip, clip)


def dynamic_threshold(x_0: Tensor, fraction: float) -> Tensor:
    """Clip each image at the size that this fraction of its values keeps, and scale back to ±1.

        s = max(1, quantile(|x_0|, fraction)),   x_0 ← clip(x_0, −s, s) / s

    For images in pixels; latents are not bounded by 1.
    Args:    x_0: (B, …).
    Source:  Saharia et al. 2022, section 2.3, arXiv:2205.11487.
    """
    limit = torch.quantile(x_0.float().abs().flatten(1), fraction, dim=1).clamp(min=1)
    limit = limit.to(x_0.dtype).reshape(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-limit, limit) / limit


def _bounded(denoiser: Denoiser, bound: Bound) -> Denoiser:
    return lambda x_t, t: bound(denoiser(x_t, t))


def _plain(name: str) -> str:
    return str(name).lower().replace(" ", "_")
