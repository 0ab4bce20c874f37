"""ln p of a picture by the probability-flow ODE, with Hutchinson's estimate of the divergence.

With θ = arctan(σ/α), r = √(α² + σ²) and z = x_t/r = cos θ x_0 + sin θ ε, the deterministic path is

    dz/dθ = v(z, θ) = (cos θ z − x̂_0(r z, t)) / sin θ,      d ln p(z)/dθ = −∇·v

(Song et al. 2021, section 4.3 and appendix D.2, arXiv:2011.13456, in the angle's variable, which
is regular up to pure noise, where α = 0). r is 1 for variance-preserving schedules. For a random
sign vector e, E[eᵀ (∂v/∂z) e] = ∇·v (Hutchinson 1990; Grathwohl et al. 2019, arXiv:1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.posterior import reconstruction_term
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]
Probes = Callable[[int], Tensor]


def angle_grid(schedule: NoiseSchedule, steps: int, start: float | None = None) -> Tensor:
    """Increasing timesteps from `start` to the last, closer together in θ where θ is small.

    √θ grows in equal steps: what is fine in a picture is decided at little noise.
    Args:    steps: of the integration, at least 1.  start: None for the first noise level.
    Returns: (steps + 1,) float32.
    """
    start = schedule.clean_timestep + 1 if start is None else start
    if steps < 1:
        raise UserError(f"the number of ODE steps must be at least 1; got {steps}.")
    if not schedule.clean_timestep < start < schedule.last_timestep:
        raise UserError(
            f"the ODE must start at a timestep between {schedule.clean_timestep} (clean, no "
            f"density) and {schedule.last_timestep}; got {start}."
        )
    known = torch.linspace(start, schedule.last_timestep, 8 * schedule.num_train_timesteps + 1)
    angles = _angle(schedule, known).sqrt().numpy()
    wanted = np.linspace(angles[0], angles[-1], steps + 1)
    grid = torch.from_numpy(np.interp(wanted, angles, known.numpy())).float()
    grid[0], grid[-1] = start, schedule.last_timestep
    return grid


def ode_log_likelihood(
    denoiser: Denoiser, x: Tensor, schedule: NoiseSchedule, timesteps: Tensor, probes: Probes
) -> Tensor:
    """ln p_t(x) of a noisy picture x at the first of the timesteps, by Heun's second-order steps.

    Args:    denoiser: (x_t, t (B,)) -> x_0, differentiable in x_t.  x: (B, C, H, W).
             timesteps: increasing, from that of x to the last; see `angle_grid`.
             probes: step -> (B, C, H, W) of independent ±1; one per step.
    Returns: (B,) nats, a log density.
    """
    levels = timesteps.tolist()
    angles = _angle(schedule, timesteps).tolist()
    radii = (schedule.alpha(timesteps).square() + schedule.sigma(timesteps).square()).sqrt()
    dimensions, z = x[0].numel(), x / float(radii[0])
    gained = torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def velocity(z: Tensor, i: int, probe: Tensor) -> tuple[Tensor, Tensor]:
        """v, and eᵀ (∂v/∂z) e for each picture."""
        cosine, sine, radius = math.cos(angles[i]), math.sin(angles[i]), float(radii[i])
        with torch.enable_grad():
            state = (radius * z).detach().requires_grad_()
            x_0 = denoiser(state, torch.full((len(z),), levels[i]))
            (gradient,) = torch.autograd.grad((x_0 * probe).sum(), state)
        trace = (gradient * probe).flatten(1).sum(1)
        return (cosine * z - x_0.detach()) / sine, (dimensions * cosine - radius * trace) / sine

    for i in range(len(levels) - 1):
        step, probe = angles[i + 1] - angles[i], probes(i).to(x.device, x.dtype)
        v, divergence = velocity(z, i, probe)
        v_end, divergence_end = velocity(z + step * v, i + 1, probe)
        z = z + step / 2 * (v + v_end)
        gained = gained + step / 2 * (divergence + divergence_end)
    end = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    return end + gained - dimensions * math.log(float(radii[0]))


def ode_bound(
    denoiser: Denoiser,
    x_0: Tensor,
    schedule: NoiseSchedule,
    noise: Tensor,
    probes: Probes,
    steps: int = 50,
) -> Tensor:
    """Lower bound on ln p(x_0) with the ODE in the place of all levels above the first.

        ln p(x_0) ≥ E[ln p(x_0|x_1) + ln p_ODE(x_1) − ln q(x_1|x_0)],    x_1 ~ q(x_1|x_0)

    The decoder N(x̂_0, β_1 I) is that of the evidence lower bound, so the two compare. (Pictures
    themselves have no density that a finite network knows: at no noise ln p_ODE grows without end.)

    Args:    noise: (B, C, H, W) standard normal, for x_1.  Others: see `ode_log_likelihood`.
    Returns: (B,) nats, a one-draw estimate.
    """
    first = schedule.clean_timestep + 1
    x_1 = schedule.q_sample(x_0, noise, first)
    with torch.no_grad():
        x_0_hat = denoiser(x_1, torch.full((len(x_0),), first))
    log_two_pi_variance = math.log(2 * math.pi * float(schedule.sigma(first)) ** 2)
    log_q = -0.5 * (noise.square() + log_two_pi_variance).flatten(1).sum(1)
    grid = angle_grid(schedule, steps)
    log_p = ode_log_likelihood(denoiser, x_1, schedule, grid, probes)
    return reconstruction_term(x_0, x_0_hat, schedule) + log_p - log_q


def _angle(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """θ = arctan(σ/α), 0 … π/2, float64."""
    return torch.atan2(schedule.sigma(t), schedule.alpha(t))
