"""Where the lecture's slides print one thing and another is meant: the numbers decide."""

import torch
from gaussian_oracle import Gaussian, normal

from latentdiff.diffusion.bounds import (
    consistency_term,
    posterior_mean,
    posterior_mean_from_eps,
    posterior_variance,
)
from latentdiff.diffusion.samplers import sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

SCHEDULE = NoiseSchedule(ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02))
DATA = Gaussian(mean=0.8, deviation=0.5)


def slide_mean(x_t: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
    """Algorithm 2 as printed: √(1 − α_t) where √(1 − ᾱ_t) is meant."""
    beta = SCHEDULE.beta(t)
    return (x_t - beta / beta.sqrt() * eps) / (1 - beta).sqrt()


def test_algorithm_2_divides_by_the_noise_of_alpha_bar_in_one_step() -> None:
    x_0, eps = normal((2, 1, 1, 16, 16), dtype=torch.float64).unbind()
    for t in (10, 500, 990):
        x_t = SCHEDULE.q_sample(x_0, eps, t)
        exact = posterior_mean(x_t, x_0, t, SCHEDULE)
        ours = posterior_mean_from_eps(x_t, eps, t, SCHEDULE)
        assert (ours - exact).abs().max() < 1e-12
        assert (slide_mean(x_t, eps, t) - exact).abs().max() > 0.01


def test_algorithm_2_divides_by_the_noise_of_alpha_bar_over_a_run() -> None:
    """With the exact noise estimate of Gaussian data, only ᾱ's version samples the data."""
    x_T = normal((1, 1, 100, 100))
    generator = torch.Generator().manual_seed(1)
    denoiser = DATA.denoiser(SCHEDULE)
    grid = timestep_grid(SCHEDULE, 1000)

    def noise(step: int) -> torch.Tensor:
        return torch.randn(x_T.shape, generator=generator)

    ours = sample("ddpm", denoiser, x_T, SCHEDULE, grid, noise)
    assert abs(ours.mean() - DATA.mean) < 0.03 and abs(ours.std() - DATA.deviation) < 0.03

    x = x_T
    for t in grid.tolist():
        x_0 = denoiser(x, torch.tensor([t]))
        eps = (x - SCHEDULE.alpha(t) * x_0) / SCHEDULE.sigma(t)
        x = slide_mean(x, eps, t) + (SCHEDULE.beta(t).sqrt() * noise(t) if t else 0)
    # Far too much noise is taken away at every step: the images collapse to one value.
    assert x.std() < 0.5 * DATA.deviation


def test_the_mean_of_q_x_t_given_x_0_has_alpha_bar() -> None:
    """The exponent of q(x_t | x_0) holds √ᾱ_t x_0, not the one-step √α_t x_0."""
    x_0, t = 2.0, 400
    x = run_forward_chain(x_0, t)
    standard_error = x.std().item() / x.numel() ** 0.5
    meant = SCHEDULE.alpha(t).item() * x_0
    printed = (1 - SCHEDULE.beta(t)).sqrt().item() * x_0
    assert abs(x.mean().item() - meant) < 4 * standard_error
    assert abs(x.mean().item() - printed) > 100 * standard_error


def test_the_variance_of_the_noise_is_one_minus_alpha_bar() -> None:
    """ᾱ_t is the signal's share; the noise in x_t has variance 1 − ᾱ_t."""
    t = 100
    variance = run_forward_chain(2.0, t).var().item()
    alpha_bar = SCHEDULE.alpha_bar(t).item()
    standard_error = (1 - alpha_bar) * (2 / 40_000) ** 0.5
    assert abs(variance - (1 - alpha_bar)) < 4 * standard_error
    assert abs(variance - alpha_bar) > 100 * standard_error


def test_the_consistency_term_averages_x_t_over_the_chain() -> None:
    """Printed: KL(q(x_t|x_{t−1}) ‖ p(x_t|x_{t+1})). It draws x_t without regard to x_{t+1}, so each
    step costs about a nat per value more, and the sum is no longer the bound."""
    generator, t = torch.Generator().manual_seed(3), 400
    shape = (1, 1, 100, 100)

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x_0 = DATA.mean + DATA.deviation * noise()
    x_prev = SCHEDULE.q_sample(x_0, noise(), t - 1)
    x_t = SCHEDULE.q_step(x_prev, noise(), t)
    x_next = SCHEDULE.q_step(x_t, noise(), t + 1)
    x_0_hat = DATA.denoiser(SCHEDULE)(x_next, torch.tensor([t + 1]))
    forward = torch.distributions.Normal(
        (1 - SCHEDULE.beta(t)).sqrt() * x_prev, SCHEDULE.beta(t).sqrt()
    )
    back = torch.distributions.Normal(
        posterior_mean(x_next, x_0_hat, t + 1, SCHEDULE), posterior_variance(t + 1, SCHEDULE).sqrt()
    )
    printed = torch.distributions.kl_divergence(forward, back).mean().item()
    drawn = (forward.log_prob(x_t) - back.log_prob(x_t)).mean().item()
    ours = consistency_term(x_prev, x_next, x_0_hat, t, SCHEDULE).item() / x_0.numel()
    print(f"nats per value: {printed:.3f} as printed, {drawn:.3f} in the chain, {ours:.3f} ours")
    assert abs(ours - drawn) < 0.05
    assert 0.8 < printed - drawn < 1.2


def test_the_start_is_noise_and_only_x_0_comes_from_the_data() -> None:
    """x_T has the same law whatever the data, and sampling from 'data' as x_T misses the data."""
    for x_0 in (-3.0, 3.0):
        x_T = run_forward_chain(x_0, 999)
        assert abs(x_T.mean().item()) < 0.04 and abs(x_T.var().item() - 1) < 0.03

    grid, denoiser = timestep_grid(SCHEDULE, 200, "trailing"), DATA.denoiser(SCHEDULE)
    from_noise = normal((1, 1, 100, 100))
    from_data = DATA.mean + DATA.deviation * from_noise
    results = [
        sample("ddim", denoiser, x_T, SCHEDULE, grid, normal) for x_T in (from_noise, from_data)
    ]
    assert abs(results[0].mean() - DATA.mean) < 0.03
    assert abs(results[1].mean() - DATA.mean) > 0.2


def run_forward_chain(x_0: float, last: int) -> torch.Tensor:
    """x_last of 40,000 independent chains, one q(x_t | x_{t−1}) after the other."""
    x = torch.full((1, 1, 200, 200), x_0)
    generator = torch.Generator().manual_seed(2)
    for t in range(last + 1):
        x = SCHEDULE.q_step(x, torch.randn(x.shape, generator=generator), t)
    return x
