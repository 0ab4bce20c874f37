"""Samplers as plain generators: from pure noise to an image, one yield per step.

A sampler sees only a denoiser (x_t, t) -> x_0; prediction type and guidance live inside it. It
keeps no state between calls: what a multistep sampler remembers is in the state that it yields.
Start reading with `step`: all are made of one kind of step.
"""

from latentdiff.diffusion.prediction import Denoiser, as_denoiser
from latentdiff.diffusion.samplers.grids import (
    SPACINGS,
    custom_grid,
    get_spacing,
    timestep_grid,
    usual_spacing,
    warn_of_late_start,
)
from latentdiff.diffusion.samplers.registry import (
    SAMPLERS,
    Sampler,
    check_options,
    dynamic_threshold,
    get_sampler,
    resume,
    run,
    sample,
    sampler_name,
    split_name,
)
from latentdiff.diffusion.samplers.solvers import ddim, ddpm
from latentdiff.diffusion.samplers.step import SamplerState

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Denoiser",
    "Sampler",
    "SamplerState",
    "as_denoiser",
    "check_options",
    "custom_grid",
    "ddim",
    "ddpm",
    "dynamic_threshold",
    "get_sampler",
    "get_spacing",
    "resume",
    "run",
    "sample",
    "sampler_name",
    "split_name",
    "timestep_grid",
    "usual_spacing",
    "warn_of_late_start",
]
