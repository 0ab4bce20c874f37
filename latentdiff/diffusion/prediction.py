"""What the network predicts, and every conversion between the four choices.

With x_t = α x_0 + σ ε each prediction is a mixture y = a x_0 + b ε:

           a     b     meaning
    eps    0     1     the noise                        (Ho et al. 2020)
    x0     1     0     the clean image
    v     −σ     α     velocity on the circle           (Salimans & Ho 2022, arXiv:2202.00512)
    flow  −1     1     velocity on the straight line    (Liu et al. 2022, arXiv:2209.03003)

Two equations in the two unknowns (x_0, ε) with determinant det = α b − σ a give

    x_0 = (b x_t − σ y) / det,      ε = (α y − a x_t) / det.

det vanishes twice: for eps where α = 0 (pure noise says nothing about x_0; refused by
`check_prediction`) and for x0 where σ = 0 (there x_0 = y, and ε is never needed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig, per_sample
from latentdiff.errors import UserError, choice_error

Prediction = Literal["eps", "x0", "v", "flow"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
Coefficient = Tensor | float
#: (x_t (B, …), t (B,) on the CPU) → the estimate of x_0: all that a sampler knows of a model.
Denoiser = Callable[[Tensor, Tensor], Tensor]


def mixture(
    prediction: str, alpha: Coefficient, sigma: Coefficient
) -> tuple[Coefficient, Coefficient]:
    """The (a, b) of y = a x_0 + b ε.

    Raises:  UserError: for an unknown prediction.
    """
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "x0":
        return 1.0, 0.0
    if prediction == "v":
        return -sigma, alpha
    if prediction == "flow":
        return -1.0, 1.0
    raise choice_error("prediction", prediction, PREDICTIONS)


def determinant(prediction: str, alpha: Coefficient, sigma: Coefficient) -> Coefficient:
    """det = α b − σ a of the two equations in (x_0, ε)."""
    a, b = mixture(prediction, alpha, sigma)
    return alpha * b - sigma * a


def target(
    prediction: str, x_0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The training target y = a x_0 + b ε.

    Args:    x_0, eps: (B, C, H, W).  alpha, sigma: (B,) or numbers, the schedule's at t.
    Returns: (B, C, H, W).
    """
    a, b = mixture(prediction, per_sample(alpha, x_0), per_sample(sigma, x_0))
    return a * x_0 + b * eps


def to_x_0(
    prediction: str, y: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The clean image that a prediction y at x_t stands for: x_0 = (b x_t − σ y) / det.

    Args:    y, x_t: (B, C, H, W).  alpha, sigma: (B,) or numbers.
    """
    if prediction == "x0":
        return y
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    _, b = mixture(prediction, alpha, sigma)
    return (b * x_t - sigma * y) / determinant(prediction, alpha, sigma)


def to_eps(
    prediction: str, y: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient
) -> Tensor:
    """The noise that a prediction y at x_t stands for: ε = (α y − a x_t) / det.

    Undefined (not finite) for an x0 prediction at σ = 0, where x_t holds no noise.
    """
    if prediction == "eps":
        return y
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    a, _ = mixture(prediction, alpha, sigma)
    return (alpha * y - a * x_t) / determinant(prediction, alpha, sigma)


def as_denoiser(
    predict: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, prediction: str
) -> Denoiser:
    """Turn a network (x_t, t) → y, guided or not, into one that answers with x_0.

    The network gets t on x_t's device; the schedule's tables stay on the CPU.
    Raises:  UserError: for a prediction that the schedule cannot turn into x_0.
    """
    check_prediction(prediction, schedule.config)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        y = predict(x_t, t.to(x_t.device))
        return to_x_0(prediction, y.to(x_t.dtype), x_t, schedule.alpha(t), schedule.sigma(t))

    return denoise


def estimate_at(denoiser: Denoiser, x: Tensor, t: float) -> Tensor:
    """x_0 at timestep t, which is handed over once per image.

    On the CPU: the schedule's tables are there, and a GPU need not be waited for.
    """
    dtype = torch.int64 if isinstance(t, int) else torch.float32
    return denoiser(x, torch.full((len(x),), t, dtype=dtype))


def check_prediction(prediction: str, schedule: ScheduleConfig) -> None:
    """Refuse a prediction that the schedule cannot turn back into x_0.

    Raises:  UserError: unknown prediction; eps with a schedule that ends in pure noise
             (zero_terminal_snr or flow), where det = α = 0.
    """
    if prediction not in PREDICTIONS:
        raise choice_error("prediction", prediction, PREDICTIONS)
    if prediction == "eps" and (schedule.zero_terminal_snr or schedule.kind == "flow"):
        cause = "zero_terminal_snr=true" if schedule.zero_terminal_snr else "schedule kind flow"
        raise UserError(
            f"prediction 'eps' cannot be used with {cause}: the last step is pure noise "
            "(alpha = 0), so the noise says nothing about the image there. "
            "Set prediction to v, flow or x0"
            + (", or zero_terminal_snr=false." if schedule.zero_terminal_snr else ".")
        )
