"""From noise to latents: the one path that the pipeline, inversion and validation share.

    denoiser = build_denoiser(network, context, negative, scale)      (x_t, t) ↦ x_0
    x_0 = sample_latents(network, denoiser, x_T, seeds, plan)

The denoiser is the U-Net on its context, guided, with its prediction turned into an estimate of
x_0. It is a plain callable and the sampler knows nothing else of the model: a method that changes
the estimate wraps one denoiser in another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import (
    Predict,
    Scale,
    guidance_context,
    guide,
    needs_unconditional,
)
from latentdiff.diffusion.noise import step_noise
from latentdiff.diffusion.samplers import Denoiser, SamplerState, as_denoiser, run
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.models.finite import not_finite
from latentdiff.models.unet import with_extra


@dataclass(frozen=True)
class Network:
    """A U-Net, and what its answers mean."""

    unet: Any
    """(x_t, t, context) → prediction, and with `project_context`, as `UNet` has it."""
    schedule: NoiseSchedule
    prediction: str
    """eps, x0, v or flow."""
    project: bool = True
    """Whether the context's keys and values are computed once and not at every step. Not possible
    where weights are sharded: they are whole only while the U-Net is called."""
    extra: Tensor | None = None
    """(B, E, h, w), what the U-Net takes in channels after those of x_t."""
    device: torch.device | None = None
    """Where it computes; None: where its weights are."""

    def on_context(self, context: Tensor) -> Predict:
        """(x_t, t) → prediction, given a context (B, tokens, width)."""
        dtype = next(self.unet.parameters()).dtype
        unet = with_extra(self.unet, self.extra)
        given = {"kv": self.unet.project_context(context)} if self.project else {"context": context}

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            return unet(x_t.to(dtype), t, **given).to(x_t.dtype)

        return predict


@dataclass(frozen=True)
class SamplingPlan:
    """How noise becomes latents, whatever the model and the prompts."""

    timesteps: Tensor
    """Decreasing; see `timestep_grid`."""
    sampler: str = "ddim"
    """A name in SAMPLERS."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The sampler's own, such as eta."""
    spacing: str | None = None
    """How the timesteps are spaced, a name in SPACINGS; None: they were given."""

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def shortened(self, strength: float) -> SamplingPlan:
        """The last `strength` of the steps, 0 … 1; at least one, unless it is 0.

        Source:  SDEdit (Meng et al. 2022, arXiv:2108.01073); the number of steps is diffusers'.
        """
        steps = max(int(self.steps * strength), 1) if strength > 0 else 0
        return replace(self, timesteps=self.timesteps[self.steps - steps :])


def build_denoiser(
    network: Network,
    context: Tensor,
    negative: Tensor | None = None,
    scale: Scale = 1.0,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """The denoiser (x_t, t (B,)) ↦ x_0 of a model on its prompts.

    Args:    context: (B, tokens, width) of the prompts.
             negative: (B or 1, tokens, width) of the negative or empty prompts; of another number
             of tokens, each half has a pass of its own. None: no guidance.
             scale, rescale, interval: of guidance, see `guide`.
    Raises:  UserError: options of guidance out of range, or a prediction that the schedule cannot
             turn into x_0.
    """
    if negative is None or not needs_unconditional(scale):
        predict = network.on_context(context)
    else:
        predict = guide(
            _on_both(network, context, negative, scale),
            scale,
            rescale=rescale,
            interval=interval,
            predict_conditional=network.on_context(context) if interval else None,
        )
    return as_denoiser(predict, network.schedule, network.prediction)


def _on_both(network: Network, context: Tensor, negative: Tensor, scale: Scale) -> Predict:
    """The prediction of the doubled batch: in one pass, or in two where the lengths differ."""
    if context.shape[1] == negative.shape[1]:
        return network.on_context(guidance_context(context, negative, scale))
    halves = (
        network.on_context(negative.expand(len(context), -1, -1)),
        network.on_context(context),
    )

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        parts = zip(halves, x_t.chunk(2), t.chunk(2), strict=True)
        return torch.cat([half(x, level) for half, x, level in parts])

    return predict


def sampled_states(
    network: Network, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int], plan: SamplingPlan
) -> Iterator[SamplerState]:
    """The sampler's states, from the noise x_T to the latents x_0.

    Args:    network: whose denoiser it is.  x_T: (B, C, h, w).
             seeds: one per image, of the noise that a stochastic sampler adds.
    Returns: their x_t is (B, C, h, w) float32 where the network is; the next step goes on from it,
             whatever was written into it.
    Raises:  UserError: sampler or options unknown.
    """
    device = network.device or next(network.unet.parameters()).device
    noise, x_T = step_noise(seeds, x_T.shape[1:], device), x_T.to(device, torch.float32)
    schedule, timesteps = network.schedule, plan.timesteps
    return run(plan.sampler, denoiser, x_T, schedule, timesteps, noise, **plan.options)


def finite_states(network: Network, states: Iterable[SamplerState]) -> Iterator[SamplerState]:
    """The states of a sampler or an inversion, looked at when all are through.

    Raises:  NotFiniteError: NaN or infinity, with the first step that has it.
    """
    visited, finite = list[float](), list[Tensor]()
    for state in states:
        visited.append(state.t)
        finite.append(state.x_t.isfinite().all())  # stays on the device: no step waits for it
        yield state
    steps = torch.stack(finite).tolist() if finite else []
    if False in steps:
        first = steps.index(False)
        where = f"step {first + 1} of {len(steps)} (timestep {visited[first]:g})"
        raise not_finite(f"the latents after {where}", "the U-Net", network.unet)


def last_latents(network: Network, x: Tensor, states: Iterable[SamplerState]) -> Tensor:
    """Where the steps of a sampler or an inversion lead from x.

    Raises:  NotFiniteError: see `finite_states`.
    """
    for state in finite_states(network, states):
        x = state.x_t
    return x


def sample_latents(
    network: Network, denoiser: Denoiser, x_T: Tensor, seeds: Sequence[int], plan: SamplingPlan
) -> Tensor:
    """Latents x_0 (B, C, h, w), float32 where the network is, from the noise x_T.

    Args:    see `sampled_states`.
    Raises:  UserError: sampler or options unknown.  NotFiniteError: see `finite_states`.
    """
    states = sampled_states(network, denoiser, x_T, seeds, plan)
    return last_latents(network, x_T, states)
