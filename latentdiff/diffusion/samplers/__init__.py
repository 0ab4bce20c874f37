"""Samplers as plain generators: from pure noise to an image, one yield per step.

A sampler sees only a denoiser (x_t, t) -> x_0; prediction type and guidance live inside it. It
keeps no state between calls: what a multistep sampler remembers is in the state that it yields.
Start reading with `walk.py`: all are made of one kind of step.
"""

from latentdiff.diffusion.samplers.grids import (
    SPACINGS,
    custom_grid,
    get_spacing,
    timestep_grid,
    warn_of_late_start,
)
from latentdiff.diffusion.samplers.registry import (
    SAMPLERS,
    Sampler,
    get_sampler,
    resume,
    run,
    sample,
    sampler_name,
    split_name,
)
from latentdiff.diffusion.samplers.solvers import (
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    euler,
    euler_ancestral,
    heun,
    lcm,
    lms,
    pndm,
    unipc,
)
from latentdiff.diffusion.samplers.step import (
    Denoiser,
    Noise,
    SamplerState,
    as_denoiser,
    dynamic_threshold,
)

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Denoiser",
    "Noise",
    "Sampler",
    "SamplerState",
    "as_denoiser",
    "custom_grid",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dynamic_threshold",
    "euler",
    "euler_ancestral",
    "get_sampler",
    "get_spacing",
    "heun",
    "lcm",
    "lms",
    "pndm",
    "resume",
    "run",
    "sample",
    "sampler_name",
    "split_name",
    "timestep_grid",
    "unipc",
    "warn_of_late_start",
]
