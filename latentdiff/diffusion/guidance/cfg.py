"""Classifier-free guidance: one batched forward pass, two answers, one extrapolation.

    y = y_uncond + w (y_cond − y_uncond)            (Ho & Salimans 2022, arXiv:2207.12598)

At a fixed x_t and t every prediction is an affine function of x_0 (see `prediction`), and an
affine combination with weights summing to 1 passes through it: guiding eps, v, flow or x_0 gives
the same image. Only `rescale`, which measures a standard deviation, depends on the choice; it
acts on the network's own output, as in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import per_sample
from latentdiff.errors import UserError

Predict = Callable[[Tensor, Tensor], Tensor]
Scale = float | Sequence[float]


def needs_unconditional(scale: Scale) -> bool:
    """Whether guidance is on: above 1, where the unconditional answer has a weight other than 0.

    A scale below 1 is off too, as in diffusers: distilled models are drawn with 0.
    """
    return any(w > 1 for w in scale) if isinstance(scale, Sequence) else scale > 1


def guidance_context(context: Tensor, empty_context: Tensor, scale: Scale) -> Tensor:
    """The context that `guide`'s forward pass expects.

    Args:    context: (B, tokens, dim) of the prompts.  empty_context: (B, tokens, dim) or
             (1, tokens, dim) of the negative or empty prompts.
    Returns: (2B, tokens, dim), unconditional half first; (B, tokens, dim) when guidance is off.
    """
    if not needs_unconditional(scale):
        return context
    return torch.cat([empty_context.expand_as(context), context])


def guide(
    predict: Predict,
    scale: Scale,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    predict_conditional: Predict | None = None,
) -> Predict:
    """Turn a network on the doubled batch into a guided network on the single one.

    Args:    predict: (x (2B, …), t (2B,)) -> y (2B, …), unconditional half first, with its
             context (or projected keys and values) already inside; see `guidance_context`.
             With guidance off it is called with the single batch and returned as it is.
             scale: w; up to 1 = off, 5-10 usual; or B of them, one for each image of the batch.
             rescale: 0 … 1, how far the standard deviation of each image is pulled back to the
             conditional one's (Lin et al. 2024, eq. 15-16, arXiv:2305.08891).
             interval: guide only while low <= t <= high, in timesteps (Kynkäänniemi et al. 2024,
             arXiv:2404.07724); outside, y is the conditional answer.
             predict_conditional: a single-batch network for outside the interval; without it
             the doubled pass is made and half of it dropped.
    Returns: (x_t (B, …), t (B,)) -> y (B, …).
    Raises:  UserError: rescale outside 0 … 1, or an empty interval.
    """
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale must lie in 0 … 1; got {rescale}.")
    if interval is not None and interval[0] > interval[1]:
        raise UserError(f"guidance interval must be (low, high) timesteps; got {interval}.")
    if not needs_unconditional(scale):
        return predict
    # An image whose own scale is off has the conditional answer, w = 1.
    w = torch.tensor([max(s, 1.0) for s in scale]) if isinstance(scale, Sequence) else scale

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        inside = interval is None or interval[0] <= float(t[0]) <= interval[1]
        if not inside and predict_conditional is not None:
            return predict_conditional(x_t, t)
        uncond, cond = predict(torch.cat([x_t, x_t]), torch.cat([t, t])).chunk(2)
        if not inside:
            return cond
        y = uncond + per_sample(w, cond) * (cond - uncond)
        return rescaled(y, cond, rescale) if rescale else y

    return guided


def rescaled(y: Tensor, cond: Tensor, amount: float) -> Tensor:
    """Pull each image's standard deviation from the guided towards the conditional one.

    Source:  Lin et al. 2024, eq. 15-16, arXiv:2305.08891.
    """
    dims = tuple(range(1, y.ndim))
    factor = cond.std(dims, keepdim=True) / y.std(dims, keepdim=True)
    return y * (amount * factor + (1 - amount))
