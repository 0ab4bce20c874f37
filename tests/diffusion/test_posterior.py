import math

import pytest
import torch

from latentdiff.diffusion.bounds import (
    bits_per_dimension,
    denoising_term,
    elbo,
    posterior_mean,
    posterior_mean_from_eps,
    posterior_variance,
    prior_matching_term,
    reconstruction_term,
)
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

KINDS = ["linear", "scaled_linear", "cosine", "flow"]


def schedule_of(kind: str, **fields: object) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig(kind=kind, **fields))


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_of_the_mean_agree(kind: str) -> None:
    schedule = schedule_of(kind)
    # At the last step of flow alpha is 0 and only the first form exists.
    t = torch.arange(schedule.clean_timestep + 1, 1000)
    x_0, eps = torch.randn(2, len(t), 2, 3, 3, dtype=torch.float64).unbind()
    x_t = schedule.q_sample(x_0, eps, t)
    weighted = posterior_mean(x_t, x_0, t, schedule)
    from_eps = posterior_mean_from_eps(x_t, eps, t, schedule)
    difference = (weighted - from_eps).abs().max().item()
    print(f"{kind}: the forms differ by {difference:.1e} at most")
    assert difference < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_bayes_rule(kind: str) -> None:
    """q(x_s|x_t,x_0) = q(x_t|x_s) q(x_s|x_0) / q(x_t|x_0): precisions add, means are weighted."""
    schedule = schedule_of(kind)
    s, t = 300, 640
    x_0, x_t = 0.7, -1.3
    scale, beta = (value.item() for value in schedule.transition(s, t))
    noise_s = schedule.sigma(s).item() ** 2
    precision = scale**2 / beta + 1 / noise_s
    mean = (scale * x_t / beta + schedule.alpha(s).item() * x_0 / noise_s) / precision
    weight_x_0, weight_x_t, variance = map(float, schedule.posterior(s, t))
    assert weight_x_0 * x_0 + weight_x_t * x_t == pytest.approx(mean, rel=1e-10)
    assert variance == pytest.approx(1 / precision, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_level_goes_back_to_the_image_without_noise(kind: str) -> None:
    schedule = schedule_of(kind)
    first = schedule.clean_timestep + 1
    x_0, x_t = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64).unbind()
    assert posterior_variance(first, schedule) == 0
    torch.testing.assert_close(posterior_mean(x_t, x_0, first, schedule), x_0)


@pytest.mark.parametrize("kind", KINDS)
def test_denoising_term_is_the_divergence_of_the_two_gaussians(kind: str) -> None:
    schedule = schedule_of(kind)
    t = torch.tensor([5, 400, 999])
    x_0, x_0_hat, x_t = torch.randn(3, 3, 2, 4, 4, dtype=torch.float64).unbind()
    deviation = posterior_variance(t, schedule).sqrt()[:, None, None, None]
    q = torch.distributions.Normal(posterior_mean(x_t, x_0, t, schedule), deviation)
    p = torch.distributions.Normal(posterior_mean(x_t, x_0_hat, t, schedule), deviation)
    expected = torch.distributions.kl_divergence(q, p).flatten(1).sum(1)
    term = denoising_term(x_0, x_0_hat, t, schedule)
    torch.testing.assert_close(term, expected, rtol=1e-8, atol=0)


def test_prior_matching_term_is_the_divergence_to_the_standard_normal() -> None:
    schedule = schedule_of("scaled_linear")
    x_0 = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    q = torch.distributions.Normal(schedule.alpha(999) * x_0, schedule.sigma(999))
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    term = prior_matching_term(x_0, schedule)
    torch.testing.assert_close(term, expected.flatten(1).sum(1))
    for pure in (schedule_of("flow"), schedule_of("cosine", zero_terminal_snr=True)):
        assert (prior_matching_term(x_0, pure) == 0).all()


def test_reconstruction_term_has_the_decoder_variance_beta_1() -> None:
    schedule = schedule_of("linear", beta_start=1e-4, beta_end=0.02)
    x_0, x_0_hat = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64).unbind()
    decoder = torch.distributions.Normal(x_0_hat, 1e-4**0.5)
    expected = decoder.log_prob(x_0).flatten(1).sum(1)
    torch.testing.assert_close(reconstruction_term(x_0, x_0_hat, schedule), expected)


@pytest.mark.parametrize("kind", ["scaled_linear", "flow"])
def test_the_bound_on_gaussian_data_meets_its_closed_form(kind: str) -> None:
    """Exact denoiser of N(0, s²): each term has a closed form, and their sum is below ln p."""
    schedule, deviation = schedule_of(kind), 0.5
    generator = torch.Generator().manual_seed(0)
    shape = (2, 1, 60, 60)
    x_0 = deviation * torch.randn(shape, generator=generator, dtype=torch.float64)

    def denoiser(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = schedule.alpha(t[0]), schedule.sigma(t[0])
        return alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * x_t

    def noise(timestep: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    terms = elbo(denoiser, x_0, schedule, noise)
    t = torch.arange(schedule.clean_timestep + 2, schedule.last_timestep + 1)
    left = 1 / (1 / deviation**2 + schedule.snr(t))  # variance of x_0 given x_t
    expected = (0.5 * (schedule.snr(t - 1) - schedule.snr(t)) * left).sum().item()
    size = x_0[0].numel()
    assert terms.denoising.mean().item() / size == pytest.approx(expected, rel=0.02)
    first = schedule.clean_timestep + 1
    beta = schedule.beta(first).item()
    error = 1 / (1 / deviation**2 + schedule.snr(first).item())
    expected = -0.5 * (error / beta + math.log(2 * math.pi * beta))
    assert terms.reconstruction.mean().item() / size == pytest.approx(expected, rel=0.02)

    exact = torch.distributions.Normal(0.0, deviation).log_prob(x_0).mean().item()
    bound = terms.total.mean().item() / size
    print(f"{kind}: bound {bound:.4f}, ln p {exact:.4f} nats per dimension")
    assert bound < exact
    bits = bits_per_dimension(terms.total, size).mean().item()
    assert bits == pytest.approx(-bound / math.log(2))
