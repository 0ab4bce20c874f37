"""What the objective offers beyond the defaults: every combination, robust losses, coarse noise."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.noise import coarse_levels
from latentdiff.diffusion.objective import (
    Draw,
    Loss,
    ObjectiveConfig,
    Weighting,
    check_objective,
    draw,
    error_cost,
    per_sample_loss,
)
from latentdiff.diffusion.prediction import PREDICTIONS
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError

SCHEDULES = {
    "linear": ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02),
    "scaled_linear": ScheduleConfig(),
    "cosine": ScheduleConfig(kind="cosine"),
    "linear, zero SNR": ScheduleConfig(
        kind="linear", beta_start=1e-4, beta_end=0.02, zero_terminal_snr=True
    ),
    "scaled_linear, zero SNR": ScheduleConfig(zero_terminal_snr=True),
    "cosine, zero SNR": ScheduleConfig(kind="cosine", zero_terminal_snr=True),
    "flow": ScheduleConfig(kind="flow"),
}
#: Reason → how many (prediction, schedule, weighting) it refuses.
REFUSED = {"pure noise": 4 * len(get_args(Weighting)), "unbounded": 1}


def loss_and_gradient(
    schedule: NoiseSchedule, config: ObjectiveConfig, timesteps: list[float]
) -> tuple[Tensor, Tensor]:
    """Losses at the timesteps, and the gradient of their sum, of a network with two weights."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps, other = torch.randn(3, len(timesteps), 4, 8, 8, generator=generator).unbind()
    t = torch.tensor(timesteps)
    if not schedule.is_flow:
        t = t.long()
    drawn = Draw(t, eps, torch.zeros(len(t), dtype=torch.bool), other)
    weights = torch.tensor([0.3, -0.1], requires_grad=True)
    loss = per_sample_loss(
        lambda x, _t, _c: weights[0] * x + weights[1], x_0, None, drawn, schedule, config
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), weights)[0]


def test_every_combination_is_finite_at_both_ends_or_refused_with_the_reason() -> None:
    refused: dict[str, int] = dict.fromkeys(REFUSED, 0)
    finite = 0
    for (name, schedule_config), prediction, weighting in product(
        SCHEDULES.items(), PREDICTIONS, get_args(Weighting)
    ):
        schedule = NoiseSchedule(schedule_config)
        last = schedule.num_train_timesteps - 1
        ends = sorted({0.0, float(last), float(schedule.last_timestep)})
        for loss in get_args(Loss):
            config = ObjectiveConfig(prediction=prediction, weighting=weighting, loss=loss)
            try:
                check_objective(config, schedule_config)
            except UserError as error:
                reason = next(word for word in REFUSED if word in str(error))
                refused[reason] += loss == "squared"
                continue
            losses, gradient = loss_and_gradient(schedule, config, ends)
            case = f"{name}, {prediction}, {weighting}, {loss}"
            assert losses.isfinite().all() and (losses >= 0).all(), case
            assert gradient.isfinite().all(), case
            # Not finite by being switched off: something is learnt at one end at least.
            assert gradient.abs().max() > 0, case
            finite += loss == "squared"
    print(f"{finite} combinations finite at both ends, refused: {refused}")
    assert refused == REFUSED
    assert finite == len(SCHEDULES) * len(PREDICTIONS) * len(get_args(Weighting)) - sum(
        REFUSED.values()
    )


@pytest.mark.parametrize(
    ("schedule", "config", "message"),
    [
        (ScheduleConfig(kind="flow"), {"prediction": "eps"}, "says nothing about the image"),
        # ᾱ_T underflows to 0 without any switch that says so.
        (
            ScheduleConfig(kind="linear", beta_start=0.9, beta_end=0.99),
            {"prediction": "eps", "weighting": "none"},
            "Lower beta_end",
        ),
        # β_0 is below float64's resolution of 1, so σ_0 = 0.
        (
            ScheduleConfig(kind="linear", beta_start=1e-18, beta_end=0.02),
            {"prediction": "x0", "weighting": "debiased"},
            "at t = 0 the signal-to-noise ratio is inf",
        ),
    ],
)
def test_refusals_say_what_and_where(
    schedule: ScheduleConfig, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(ObjectiveConfig(**config), schedule)


def test_x0_keeps_its_weight_at_the_clean_end_of_flow() -> None:
    """W at infinite SNR is γ; the weight next to it is almost that."""
    schedule = NoiseSchedule(SCHEDULES["flow"])
    from latentdiff.diffusion.objective import loss_weight

    for weighting in ("min_snr", "soft_min_snr", "soft_flow"):
        config = ObjectiveConfig(prediction="x0", weighting=weighting, min_snr_gamma=3.0)
        at_end, beside = loss_weight(torch.tensor([0.0, 0.01]), schedule, config)
        assert at_end == 3 and beside == pytest.approx(3, rel=1e-6)


def test_huber_is_that_of_torch_and_both_meet_their_asymptotes() -> None:
    error = torch.tensor([-50.0, -0.3, -1e-4, 0.0, 1e-4, 0.2, 0.31, 50.0], dtype=torch.float64)
    huber = error_cost(error, ObjectiveConfig(loss="huber", huber_delta=0.3))
    inside = error.abs() <= 0.3
    torch.testing.assert_close(huber[inside], error[inside].square())
    torch.testing.assert_close(huber[~inside], 0.3 * (2 * error[~inside].abs() - 0.3))
    smooth = error_cost(error, ObjectiveConfig(loss="pseudo_huber", huber_delta=0.3))
    torch.testing.assert_close(smooth, 0.6 * ((error.square() + 0.09).sqrt() - 0.3))
    assert smooth[0].item() == pytest.approx(2 * 0.3 * 50, rel=0.01)
    assert smooth[4].item() == pytest.approx(1e-8, rel=1e-6)
    assert (smooth <= huber + 1e-15).all() and (huber <= error.square() + 1e-15).all()


def test_a_large_delta_is_the_squared_loss() -> None:
    schedule = NoiseSchedule(SCHEDULES["scaled_linear"])
    squared, _ = loss_and_gradient(schedule, ObjectiveConfig(), [0, 500, 999])
    for loss in ("huber", "pseudo_huber"):
        found, _ = loss_and_gradient(
            schedule, ObjectiveConfig(loss=loss, huber_delta=1e4), [0, 500, 999]
        )
        torch.testing.assert_close(found, squared, rtol=1e-5, atol=0)


def test_coarse_levels_halve_down_to_one() -> None:
    assert coarse_levels((4, 16, 12)) == [(4, 8, 6), (4, 4, 3), (4, 2, 2), (4, 1, 1)]
    assert coarse_levels((4, 1, 5)) == []


def test_multi_resolution_noise_has_unit_variance_everywhere_and_its_correlation() -> None:
    """Two positions share every octave in which they lie in the same cell."""
    share, count = 0.5, 6000
    config = ObjectiveConfig(multires_noise=share)
    schedule = NoiseSchedule(SCHEDULES["scaled_linear"])
    many = draw(0, range(count), (1, 8, 8), config, schedule)
    eps = many.eps[:, 0].double()
    power = sum(share ** (2 * k) for k in range(4))
    error = 5 * (2 / count) ** 0.5
    assert (eps.var(0) - 1).abs().max() < error
    neighbours = (eps[:, 0, 0] * eps[:, 0, 1]).mean().item()
    far = (eps[:, 0, 0] * eps[:, 7, 7]).mean().item()
    assert neighbours == pytest.approx((power - 1) / power, abs=error)
    assert far == pytest.approx(share**6 / power, abs=error)
    plain = draw(0, range(count), (1, 8, 8), ObjectiveConfig(), schedule)
    assert torch.equal(plain.t, many.t) and torch.equal(plain.posterior_eps, many.posterior_eps)


def test_multi_resolution_noise_is_the_same_in_any_batch_and_beside_offset_noise() -> None:
    schedule, shape = NoiseSchedule(SCHEDULES["scaled_linear"]), (4, 6, 10)
    both = ObjectiveConfig(multires_noise=0.3, offset_noise=0.1)
    whole = draw(3, range(20), shape, both, schedule)
    part = draw(3, [17, 4], shape, both, schedule)
    assert torch.equal(part.eps, whole.eps[[17, 4]])
    offset_only = draw(3, range(20), shape, ObjectiveConfig(offset_noise=0.1), schedule)
    assert not torch.equal(offset_only.eps, whole.eps)
