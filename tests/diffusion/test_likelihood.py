"""Both forms of the bound and the ODE's likelihood on Gaussian data, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from correlated_oracle import LN2, Blocks
from torch import Tensor

from latentdiff.diffusion.bounds import (
    ElboTerms,
    angle_grid,
    draw_levels,
    elbo,
    elbo_of_chain,
    level_probabilities,
    ode_bound,
    ode_log_likelihood,
    sampled_elbo,
)
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError

DATA = Blocks()
DIMENSIONS = math.prod(DATA.shape)
#: A tenth of the usual levels, each with ten times the β: the closed forms hold for any number.
SCHEDULES = {
    "linear": ScheduleConfig("linear", 100, beta_start=1e-3, beta_end=0.2),
    "flow": ScheduleConfig("flow", 100),
    "scaled_linear": ScheduleConfig("scaled_linear", 100, beta_start=0.0085, beta_end=0.12),
    "zero_snr": ScheduleConfig("scaled_linear", 100, 0.0085, 0.12, zero_terminal_snr=True),
    "cosine": ScheduleConfig("cosine", 100),
    "linear, 1000 levels": ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
}
FAST = ("linear", "flow")
EACH = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in SCHEDULES]
WAYS = ("every level", "the lecture's chain", "sampled levels", "ODE")


def bits(nats: Tensor) -> Tensor:
    """Negative log-likelihood in bits per dimension of each image."""
    return -nats / (DIMENSIONS * LN2)


def estimate(values: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def noise_of(count: int, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)

    def noise(_: int) -> Tensor:
        return torch.randn(count, *DATA.shape, generator=generator, dtype=torch.float64)

    return noise


def signs(count: int, seed: int = 4):
    generator = torch.Generator().manual_seed(seed)

    def probe(_: int) -> Tensor:
        drawn = torch.randint(2, (count, *DATA.shape), generator=generator, dtype=torch.float64)
        return 2 * drawn - 1

    return probe


def above_the_entropy(name: str, way: str, count: int) -> tuple[float, float, float]:
    """Estimate − ln p and its standard error, and what it is exactly, in bits per dimension.

    Against ln p of the same images, which takes the spread of the data out of the mean.
    """
    schedule = NoiseSchedule(SCHEDULES[name])
    x_0, denoiser = DATA.draw(count), DATA.denoiser(schedule)
    exact = DATA.ode_bound(schedule) if way == "ODE" else DATA.bound(schedule)
    if way == "every level":
        found = elbo(denoiser, x_0, schedule, noise_of(count)).total
    elif way == "the lecture's chain":
        found = elbo_of_chain(denoiser, x_0, schedule, noise_of(count)).total
    elif way == "sampled levels":
        found = sampled_elbo(denoiser, x_0, schedule, range(count), 48).posterior_form.total
    else:
        found = ode_bound(denoiser, x_0, schedule, noise_of(count)(0), signs(count))
    above, error = estimate(bits(found) - bits(DATA.log_density(x_0)))
    wanted = exact - DATA.entropy()
    print(
        f"{name}, {way}: {above:.4f} ± {error:.4f} bits per dimension above the entropy "
        f"{DATA.entropy():.4f}; exactly {wanted:.4f}"
    )
    return above, error, wanted


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("way", WAYS)
def test_the_bound_meets_its_exact_value(name: str, way: str) -> None:
    above, error, wanted = above_the_entropy(name, way, 16 if way == "ODE" else 60)
    assert above > -3 * error
    assert abs(above - wanted) < 4 * error + (0.002 if way == "ODE" else 0) and error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [("linear", way) for way in WAYS[:2]] + [(name, way) for name in SCHEDULES for way in WAYS[2:]],
)
def test_the_bound_is_within_a_hundredth_of_a_bit(name: str, way: str) -> None:
    """And never below the exact negative log-likelihood; decoder variance β_1."""
    above, error, wanted = above_the_entropy(name, way, 32 if way == "ODE" else 2000)
    assert above > -3 * error
    assert abs(above - wanted) < 0.01 and error < 0.005


@pytest.mark.parametrize("name", EACH)
def test_both_forms_agree_in_expectation(name: str) -> None:
    """From the same network calls: their difference is 0 up to its own standard error."""
    schedule = NoiseSchedule(SCHEDULES[name])
    count = 128
    x_0, denoiser = DATA.draw(count), DATA.denoiser(schedule)
    both = sampled_elbo(denoiser, x_0, schedule, range(count), 32)
    difference, error = estimate(bits(both.lecture_form.total) - bits(both.posterior_form.total))
    ours, theirs = (
        [f"{bits(term).mean():.3f}" for term in form]
        for form in (both.posterior_form, both.lecture_form)
    )
    print(f"{name}: {ours} and {theirs}; totals differ by {difference:.4f} ± {error:.4f}")
    assert abs(difference) < 4 * error
    assert error < 0.1


def test_sampled_levels_are_unbiased_for_each_form_of_a_fixed_function() -> None:
    """Weights of the drawn levels sum any function of t to its exact sum, over many offsets."""
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    chance = level_probabilities(schedule)
    assert chance.sum().item() == pytest.approx(1) and chance.min() > 0.4 / 999
    timesteps, weights = draw_levels(torch.rand(4000, dtype=torch.float64), 16, schedule)
    assert timesteps.min() >= 1 and timesteps.max() <= 999
    assert (timesteps[:, 1:] >= timesteps[:, :-1]).all()
    t = torch.arange(1, 1000, dtype=torch.float64)
    for function in (torch.ones_like, lambda t: 1 / t, lambda t: t.square()):
        found, error = estimate((weights * function(timesteps.double())).sum(1))
        assert abs(found - function(t).sum().item()) < 4 * error


def test_an_image_has_the_same_bound_in_any_batch() -> None:
    schedule = NoiseSchedule(ScheduleConfig())
    x_0, denoiser = DATA.draw(6), DATA.denoiser(schedule)
    whole = sampled_elbo(denoiser, x_0, schedule, range(6), 8)
    alone = sampled_elbo(denoiser, x_0[4:5], schedule, [4], 8)
    torch.testing.assert_close(alone.steps[0], whole.steps[4])
    assert torch.equal(alone.timesteps[0], whole.timesteps[4])
    assert not torch.equal(whole.timesteps[0], whole.timesteps[4])


@pytest.mark.parametrize("name", EACH)
def test_the_ode_has_second_order_and_the_exact_density(name: str) -> None:
    """Against the exact density, with probes that make Hutchinson's estimate exact."""
    schedule = NoiseSchedule(SCHEDULES[name])
    first = schedule.clean_timestep + 1
    x_0 = DATA.draw(2, seed=9)
    x_1 = schedule.q_sample(x_0, noise_of(2)(0), first)
    denoiser = DATA.denoiser(schedule)

    # Averaged over all sign patterns of a block that a Hadamard matrix lists, eᵀJe is tr J.
    patterns = hadamard().repeat(1, DIMENSIONS // 8).reshape(8, 1, *DATA.shape)
    probe = patterns.expand(-1, 2, -1, -1, -1).flatten(0, 1)

    def log_density(steps: int) -> Tensor:
        grid, each = angle_grid(schedule, steps), x_1.repeat(8, 1, 1, 1)
        found = ode_log_likelihood(denoiser, each, schedule, grid, lambda _: probe)
        return found.reshape(8, 2).mean(0)

    exact = DATA.ode_log_density(x_1, schedule, first)
    errors = [
        (bits(log_density(steps)) - bits(exact)).abs().mean().item() for steps in (20, 40, 80)
    ]
    print(f"{name}: errors {[f'{e:.1e}' for e in errors]} bits per dimension")
    assert errors[1] < 0.003
    assert errors[0] / errors[1] > 3.4 and errors[1] / errors[2] > 3.4


def hadamard() -> Tensor:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(torch.kron(two, two), two)


def test_the_ode_starts_anywhere_above_the_clean_image() -> None:
    schedule = NoiseSchedule(SCHEDULES["linear"])
    x_t = schedule.q_sample(DATA.draw(8), noise_of(8)(0), 30)
    found = ode_log_likelihood(
        DATA.denoiser(schedule), x_t, schedule, angle_grid(schedule, 50, 30), signs(8)
    )
    exact = DATA.ode_log_density(x_t, schedule, 30)
    torch.testing.assert_close(bits(found), bits(exact), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: angle_grid(s, 0), "at least 1; got 0"),
        (lambda s: angle_grid(s, 5, -1), "clean, no density"),
        (lambda s: angle_grid(s, 5, 999), "got 999"),
        (lambda s: sampled_elbo(lambda x, t: x, DATA.draw(1), s, [0], 0), "1 … 999; got 0"),
        (lambda s: sampled_elbo(lambda x, t: x, DATA.draw(1), s, [0], 1000), "got 1000"),
    ],
)
def test_bad_numbers(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(NoiseSchedule(ScheduleConfig()))


def test_terms_add_up() -> None:
    terms = ElboTerms(torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([3.0]))
    assert terms.total.item() == 1.0
