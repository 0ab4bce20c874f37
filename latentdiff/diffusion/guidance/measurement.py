"""Denoisers that know a measurement y = A x + σ_y ε of the image that they look for.

At noise level t the denoiser says that x_0 is about x̂ = E[x_0 | x_t]. Let V be the covariance that
this leaves. If x_0 | x_t were N(x̂, V), then

    E[x_0 | x_t, y] = x̂ + V Aᵀ (σ_y² I + A V Aᵀ)⁻¹ (y − A x̂).                              (*)

Both methods are (*), with two choices of V:

`ddnm`  V = v_t I with 1/v_t = 1 + α_t²/σ_t²: of white data of unit variance. For σ_y = 0 it is
        x̂ + A⁺(y − A x̂): what A sees from y, the rest from the model (Wang et al. 2023,
        arXiv:2212.00490). For σ_y > 0 it is the step of ΠGDM (Song et al. 2023) and of DiffPIR
        (Zhu et al. 2023, arXiv:2305.08995).
`mmps`  V = (σ_t²/α_t) ∂x̂/∂x_t, which is Cov[x_0 | x_t] for any data. So (*) is exact for Gaussian
        data, white or not. It differentiates the network (Rozet et al. 2024, arXiv:2405.13712).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.operators import Operator
from latentdiff.diffusion.prediction import Denoiser
from latentdiff.diffusion.schedule import NoiseSchedule, per_sample

Linear = Callable[[Tensor], Tensor]


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
    """Correct each estimate by a measurement, as if the data were white.

    Args:    operator, y, noise: y = A x + noise · ε, (B, …), of images x, in their units.
             decode, encode: estimates ↔ images, of a latent model. The images are corrected, and
             the estimate by what that changes of their latents.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        estimate = denoiser(x_t, t)
        image = decode(estimate)
        if noise == 0:
            corrected = image + operator.pseudo_inverse(y - operator.apply(image))
        else:
            v = per_sample(1 / (1 + schedule.snr(t)), x_t)
            corrected = condition(image, lambda u: v * u, operator, y, noise)
        return estimate + encode(corrected) - encode(image)

    return denoise


def mmps(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    operator: Operator,
    y: Tensor,
    noise: float,
    *,
    iterations: int = 5,
) -> Denoiser:
    """Correct each estimate by a measurement, with the covariance that the denoiser itself has.

    Args:    operator, y, noise: y = A x_0 + noise · ε, (B, …).
             iterations: of conjugate gradients; each goes back through the denoiser once.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        # In pure noise, α = 0, nothing is known of x_0 and its covariance is not in the slope.
        gain = per_sample(schedule.sigma(t).square() / schedule.alpha(t).clamp(min=1e-4), x_t)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            estimate = denoiser(x_t, t)

        def covariance(u: Tensor) -> Tensor:
            return gain * torch.autograd.grad(estimate, x_t, u, retain_graph=True)[0]

        return condition(estimate.detach(), covariance, operator, y, noise, iterations)

    return denoise


def condition(
    x: Tensor, covariance: Linear, operator: Operator, y: Tensor, noise: float, iterations: int = 20
) -> Tensor:
    """Equation (*): the mean of N(x, V), given y = A x + noise · ε.

    Args:    x: (B, C, H, W).  covariance: V.  iterations: of conjugate gradients.
    """

    def spread(r: Tensor) -> Tensor:
        return noise**2 * r + operator.apply(covariance(operator.adjoint(r)))

    solved = conjugate_gradients(spread, y - operator.apply(x), iterations)
    return x + covariance(operator.adjoint(solved))


def agree(x: Tensor, operator: Operator, y: Tensor, tolerance: float) -> Tensor:
    """An image in −1 … 1 near x with |A x − y| ≤ tolerance, as nearly as there is one.

    What exceeds the tolerance is taken back and what leaves the range is clipped, in turns, with
    momentum (FISTA: Beck & Teboulle 2009, eq. 4.1-4.3).
    """
    x = x.clamp(-1, 1)
    ahead, momentum = x, 1.0
    for _ in range(200):
        off = y - operator.apply(ahead)
        excess = off - off.clamp(-tolerance, tolerance)
        if not excess.any():
            return ahead
        last, x = x, (ahead + operator.correction(excess)).clamp(-1, 1)
        before, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = (x + (before - 1) / momentum * (x - last)).clamp(-1, 1)
    return x


def conjugate_gradients(matrix: Linear, b: Tensor, iterations: int) -> Tensor:
    """x with M x = b, for a symmetric and positive M, of each image of the batch for itself.

    Of a singular M the smallest x. Ends for an image where M is not positive.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (b.ndim - 1))

    x, r = torch.zeros_like(b), b
    p, size = r, dot(r, r)
    least = size * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        image = matrix(p)
        curvature = dot(p, image)
        going = (curvature > 0) & (size > least)
        if not going.any():
            break
        step = torch.where(going, size / curvature, 0)
        x, r = x + step * p, r - step * image
        before, size = size, dot(r, r)
        p = r + torch.where(going, size / before, 0) * p
    return x
