"""The likelihood of captioned images under a model, in bits per latent dimension.

x_0 is a draw of the autoencoder's posterior, as in training, given its caption. The figures are
densities of latents: they compare models that share an autoencoder, and may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.bounds import (
    SampledBound,
    bits_per_dimension,
    level_probabilities,
    ode_bound,
    sampled_elbo,
)
from latentdiff.diffusion.noise import batch_noise
from latentdiff.diffusion.prediction import Denoiser, determinant
from latentdiff.diffusion.schedule import NoiseSchedule
from latentdiff.errors import UserError
from latentdiff.sampling import build_denoiser

#: Seeds of different purposes lie this far apart.
_APART = 1_000_000
#: The plot's points along the timesteps.
BINS = 25


@dataclass(frozen=True)
class LikelihoodSize:
    """How much is measured."""

    levels: int = 32
    """Levels that each image visits for the bound; the other levels stand for themselves."""
    ode_images: int = 8
    """Images of the probability-flow ODE; 0 leaves it out."""
    ode_steps: int = 50
    """Steps of the ODE, each two network calls and their gradients."""
    batch_size: int = 16
    """Images per pass; does not change the figures."""

    def __post_init__(self) -> None:
        for name, least in (
            ("levels", 1),
            ("ode_images", 0),
            ("ode_steps", 1),
            ("batch_size", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}; got {getattr(self, name)}.")


@dataclass
class Likelihood:
    """What was found of one set of images."""

    figures: dict[str, Any] = field(default_factory=dict)
    """Means by name, each followed by its standard error."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """`timestep`, `loss` (mean squared error of the network's answer) and `bits` (what one step of
    the bound costs, per dimension), by bins of timesteps."""


def measure(
    pipeline: Any, images: Tensor, captions: Sequence[str], size: LikelihoodSize
) -> Likelihood:
    """Both forms of the bound, and the ODE's.

    Args:    pipeline: a LatentDiffusionPipeline.  images: (N, 3, H, W) in [−1, 1].
             captions: one for each image.
    """
    bounds: list[SampledBound] = []
    ode: list[Tensor] = []
    for start in range(0, len(images), size.batch_size):
        rows = range(start, min(start + size.batch_size, len(images)))
        x_0 = _latents(pipeline, images, rows)
        denoiser = _denoiser(pipeline, images, captions, rows)
        with torch.no_grad():
            bounds.append(sampled_elbo(denoiser, x_0, pipeline.schedule, rows, size.levels))
        few = [row for row in rows if row < size.ode_images]
        if few:
            denoiser = _denoiser(pipeline, images, captions, few)
            ode.append(_ode(denoiser, x_0[: len(few)], few, pipeline.schedule, size.ode_steps))
    shape = tuple(x_0.shape[1:])
    figures = summary(bounds, math.prod(shape))
    if ode:
        values = bits_per_dimension(torch.cat(ode), math.prod(shape))
        figures |= _mean("ODE and reconstruction", values)
        figures["ODE images"] = len(values)
    return Likelihood(figures, loss_curve(bounds, pipeline, math.prod(shape)))


def summary(bounds: Sequence[SampledBound], dimensions: int) -> dict[str, Any]:
    """The terms of both forms, averaged over images; the cost in bits, so lower is better."""
    figures: dict[str, Any] = {"images": sum(len(b.timesteps) for b in bounds)}
    for form, name in (("posterior_form", "DDPM"), ("lecture_form", "lecture")):
        for term, sign in (("reconstruction", 1), ("prior_matching", -1), ("denoising", -1)):
            nats = torch.cat([getattr(getattr(b, form), term) for b in bounds])
            word = "consistency" if term == "denoising" else term.replace("_", " ")
            figures |= _mean(f"{name}: {word}", bits_per_dimension(sign * nats, dimensions))
        nats = torch.cat([getattr(b, form).total for b in bounds])
        figures |= _mean(f"{name}: sum of the three", bits_per_dimension(nats, dimensions))
    return figures


def loss_curve(
    bounds: Sequence[SampledBound], pipeline: Any, dimensions: int
) -> dict[str, list[float]]:
    """Loss and bits by timestep. Within a bin each level counts the same, however often drawn."""
    schedule: NoiseSchedule = pipeline.schedule
    timesteps = torch.cat([b.timesteps.flatten() for b in bounds])
    alpha, sigma = schedule.alpha(timesteps), schedule.sigma(timesteps)
    # An x_0 error of size 1 is an error of det/σ in the network's own answer.
    factor = torch.as_tensor(determinant(pipeline.prediction, alpha, sigma) / sigma).square()
    losses = factor * torch.cat([b.squared_errors.flatten() for b in bounds]).cpu().double()
    bits = torch.cat([b.steps.flatten() for b in bounds]).cpu().double()
    bits = bits / (dimensions * math.log(2))
    first = schedule.clean_timestep + 2
    weights = 1 / level_probabilities(schedule)[timesteps - first]
    which = (timesteps - first) * BINS // (schedule.last_timestep + 1 - first)
    curve: dict[str, list[float]] = {"timestep": [], "loss": [], "bits": []}
    for number in which.unique().tolist():
        share = weights * (which == number)
        share = share / share.sum()
        for name, values in (("timestep", timesteps), ("loss", losses), ("bits", bits)):
            curve[name].append(float((share * values).sum()))
    return curve


def plot(curve: dict[str, list[float]], file: Path, title: str) -> None:
    """Draw a loss curve. Raises: UserError: without matplotlib."""
    check_plot()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    axes[0].plot(curve["timestep"], curve["loss"], "o-", markersize=3)
    axes[1].plot(curve["timestep"], curve["bits"], "o-", markersize=3)
    axes[0].set(xlabel="timestep", ylabel="mean squared error", title=title)
    axes[1].set(xlabel="timestep", ylabel="bits per dimension and step", yscale="log")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def check_plot() -> None:
    """Refuse to start what cannot be plotted at its end. Raises: UserError."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "the plot of the loss needs matplotlib, which is not installed. "
            'Install it with: pip install "latentdiff[eval]"'
        )


def _latents(pipeline: Any, images: Tensor, rows: Sequence[int]) -> Tensor:
    """x_0 of some images, drawn from the autoencoder's posterior."""
    with torch.no_grad():
        moments = pipeline.autoencoder.encode_moments(images[list(rows)].to(pipeline.device))
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        eps = batch_noise([_APART + row for row in rows], shape).to(pipeline.device)
        return pipeline.autoencoder.latents_from_moments(moments, eps)


def _denoiser(
    pipeline: Any, images: Tensor, captions: Sequence[str], rows: Sequence[int]
) -> Denoiser:
    with torch.no_grad():
        context = pipeline.text_encoder.encode([captions[row] for row in rows])
        return build_denoiser(pipeline.network_for(images.shape[-2:]), context)


def _ode(
    denoiser: Denoiser, x_0: Tensor, rows: Sequence[int], schedule: NoiseSchedule, steps: int
) -> Tensor:
    seeds = [2 * _APART + row for row in rows]
    noise = batch_noise(seeds, x_0.shape[1:]).to(x_0.device)

    def signs(step: int) -> Tensor:
        return batch_noise(seeds, x_0.shape[1:], step).sign()

    return ode_bound(denoiser, x_0, schedule, noise, signs, steps)


def _mean(name: str, values: Tensor) -> dict[str, float | None]:
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None
    return {name: float(values.mean()), f"{name}, standard error": error}
