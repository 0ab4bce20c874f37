"""Denoisers that know a measurement y = A x + σ_y ε of the image that they look for.

At noise level t the denoiser says that x_0 is about x̂ = E[x_0 | x_t]. Let V be the covariance of
what it does not know. If x_0 | x_t were N(x̂, V), the measurement would make that

    E[x_0 | x_t, y] = x̂ + V Aᵀ (σ_y² I + A V Aᵀ)⁻¹ (y − A x̂).                         (*)

Both methods are (*), with two choices of V:

`ddnm`      V = v_t I, 1/v_t = 1 + α_t²/σ_t²: what unit-variance data would leave. For σ_y = 0 it is
            x̂ + A⁺(y − A x̂), the range of A from y and its null space from the model (Wang et al.
            2023, arXiv:2212.00490); for σ_y > 0, its DDNM+, ΠGDM's and DiffPIR's step.
`mmps`      V = (σ_t²/α_t) ∂x̂/∂x_t, the denoiser's own covariance, by Tweedie's second formula
            (Rozet et al. 2024, arXiv:2405.13712). Exact for Gaussian data; the network is
            differentiated.

Of a latent model x̂ are latents, and A acts on their pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.operators import Operator
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule, per_sample

Linear = Callable[[Tensor], Tensor]


def condition(
    x: Tensor,
    covariance: Linear,
    operator: Operator,
    y: Tensor,
    noise: float | Tensor,
    iterations: int = 20,
) -> Tensor:
    """Equation (*) of the module: the mean of N(x, V) given y = A x + noise · ε.

    Args:    x: (B, C, H, W).  covariance: V.  y: what was measured, (B, …).
             noise: σ_y ≥ 0, a number or broadcasting to y.  iterations: of conjugate gradients.
    """

    def spread(r: Tensor) -> Tensor:
        return noise**2 * r + operator.apply(covariance(operator.adjoint(r)))

    solved = conjugate_gradients(spread, y - operator.apply(x), iterations)
    return x + covariance(operator.adjoint(solved))


def conjugate_gradients(matrix: Linear, b: Tensor, iterations: int) -> Tensor:
    """x with M x = b for a symmetric, positive matrix M, each image of the batch for itself.

    Of a singular M the smallest x. Stops where M is not positive along a direction.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return per_sample((u * v).flatten(1).sum(1), b)

    x, r = torch.zeros_like(b), b
    p, size = r, dot(r, r)
    least = size * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        image = matrix(p)
        curvature = dot(p, image)
        going = (curvature > 0) & (size > least)
        step = torch.where(going, size / curvature, 0)
        x, r = x + step * p, r - step * image
        before, size = size, dot(r, r)
        p = r + torch.where(going, size / before, 0) * p
    return x


def ddnm(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    operator: Operator,
    y: Tensor,
    noise: float = 0.0,
    *,
    decode: Linear = lambda z: z,
    encode: Linear = lambda x: x,
) -> Denoiser:
    """Correct each estimate where it contradicts a measurement.

    Args:    operator, y, noise: y = A x + noise · ε of the images x, in their units.
             decode, encode: estimates ↔ images; the correction is made on images, and what it
             changes is encoded.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        estimate = denoiser(x_t, t)
        v = per_sample(1 / (1 + schedule.snr(t)), x_t)
        image = decode(estimate)
        right = condition(image, lambda u: v * u, operator, y, noise)
        return estimate + encode(right) - encode(image)

    return denoise


def mmps(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    operator: Operator,
    y: Tensor,
    noise: float,
    *,
    decode: Linear = lambda z: z,
    iterations: int = 3,
) -> Denoiser:
    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            estimate = denoiser(x_t, t)
            z = estimate.detach().requires_grad_()
            seen = operator.apply(decode(z))
            dummy = torch.zeros_like(seen, requires_grad=True)
            (pulled,) = torch.autograd.grad(seen, z, dummy, create_graph=True)
        gain = per_sample(sigma.square() / alpha.clamp(min=1e-2), x_t)

        def covariance(u):
            return gain * torch.autograd.grad(estimate, x_t, u, retain_graph=True)[0]

        def adjoint(u):
            return torch.autograd.grad(seen, z, u, retain_graph=True)[0]

        def apply(u):
            return torch.autograd.grad(pulled, dummy, u, retain_graph=True)[0]

        def spread(r):
            return noise**2 * r + apply(covariance(adjoint(r)))

        solved = conjugate_gradients(spread, (y - seen).detach(), iterations)
        return (estimate + covariance(adjoint(solved))).detach()

    return denoise
