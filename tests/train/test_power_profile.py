import itertools
import math

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.train.ema import (
    LONGEST,
    Profile,
    decay_of,
    fit,
    gamma_of,
    inner_products,
    misfit,
    sigma_rel_of,
)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, LONGEST])
def test_gamma_undoes_sigma_rel(sigma_rel: float) -> None:
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_sigma_rel_is_the_spread_of_the_profile() -> None:
    gamma = gamma_of(0.1)
    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (gamma + 1) * time**gamma / 200_000
    mean = (density * time).sum()
    assert float((density * (time - mean) ** 2).sum().sqrt()) == pytest.approx(0.1, rel=1e-4)


def test_the_values_of_the_paper() -> None:
    # Karras et al. 2024, section 3.1 and appendix C: σ_rel of 5 % and 10 %.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, math.nan])
def test_lengths_that_do_not_exist_are_refused(length: float) -> None:
    with pytest.raises(UserError, match=r"0\.2887.*got"):
        gamma_of(length)


def tracked_weights(gamma: float, steps: int) -> torch.Tensor:
    """How much each step's weights count in the tracked average, by tracking unit vectors."""
    average = torch.zeros(steps, dtype=torch.float64)
    for k in range(1, steps + 1):
        average = average * decay_of(gamma, k)
        average[k - 1] += 1 - decay_of(gamma, k)
    return average


def test_the_tracked_average_is_the_integral_of_the_profile_over_each_step() -> None:
    gamma, steps = gamma_of(0.1), 50
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (gamma + 1)
    torch.testing.assert_close(tracked_weights(gamma, steps), edges.diff(), rtol=1e-10, atol=1e-15)


def test_inner_products_against_quadrature() -> None:
    profiles = [Profile(3.0, 40), Profile(10.0, 100), Profile(0.0, 70), Profile(10.0, 40)]
    time = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 10_000  # 0 … 100
    curves = [
        torch.where(time <= p.step, (p.gamma + 1) / p.step * (time / p.step) ** p.gamma, 0.0)
        for p in profiles
    ]
    numbers = torch.stack([torch.stack([(a * b).sum() for b in curves]) for a in curves]) / 10_000
    torch.testing.assert_close(inner_products(profiles, profiles), numbers, rtol=1e-3, atol=1e-6)


def test_a_tracked_length_is_its_own_reconstruction() -> None:
    stored = [Profile(gamma_of(s), k) for k in (100, 200, 300) for s in (0.05, 0.1)]
    expected = torch.tensor([0.0, 0, 0, 0, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(fit(stored, stored[-1]), expected, rtol=0, atol=1e-6)
    assert misfit(stored, expected, stored[-1]) < 1e-7


def test_more_snapshots_fit_better_and_coefficients_sum_to_one() -> None:
    wanted = Profile(gamma_of(0.15), 1200)
    errors = []
    for count in (3, 6, 12, 24, 48):
        ends = [1200 * (i + 1) // count for i in range(count)]
        stored = [Profile(gamma_of(s), end) for end in ends for s in (0.05, 0.1)]
        coefficients = fit(stored, wanted)
        assert float(coefficients.sum()) == pytest.approx(1, abs=1e-9)
        errors.append(misfit(stored, coefficients, wanted))
    assert all(b < a / 2 for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 2e-3


def test_snapshots_that_are_there_twice_do_no_harm() -> None:
    stored = [Profile(gamma_of(s), k) for k in (50, 100, 100) for s in (0.05, 0.1)]
    wanted = Profile(gamma_of(0.07), 100)
    twice, once = fit(stored, wanted), fit(stored[:4], wanted)
    assert misfit(stored, twice, wanted) == pytest.approx(
        misfit(stored[:4], once, wanted), rel=1e-3
    )
