"""Gaussian data and a linear measurement with Gaussian noise: the posterior has a closed form."""

import pytest
import torch
from correlated_oracle import BLOCK, Blocks
from gaussian_oracle import normal

from latentdiff.diffusion.guidance.measurement import agree, ddnm, mmps
from latentdiff.diffusion.guidance.tiled import tiled
from latentdiff.diffusion.operators import Blur, Downsample, Grey, Identity, Mask
from latentdiff.diffusion.prediction import estimate_at
from latentdiff.diffusion.samplers import run, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

SHAPE = (3, 2, BLOCK)
SIZE = 3 * 2 * BLOCK
SCHEDULE = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
OPERATORS = {
    "identity": Identity(),
    "mask": Mask((torch.arange(2 * BLOCK) % 3 > 0).view(2, BLOCK)),
    "grey": Grey(),
    "blur": Blur(SHAPE[1:], 1.0),
    "half": Downsample(SHAPE[1:], (1, BLOCK // 2)),
}
everything = pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)


class White(Blocks):
    """Independent values of variance 1."""

    @property
    def variances(self) -> torch.Tensor:
        return torch.ones(BLOCK, dtype=torch.float64)


METHODS = {"ddnm": (ddnm, White(SHAPE)), "mmps": (mmps, Blocks(SHAPE))}
methods = pytest.mark.parametrize("method", METHODS)


def posterior(mean, covariance, operator, y, noise):
    """Mean and covariance of x, given y = A x + noise · ε, flat."""
    A = operator.apply(torch.eye(SIZE, dtype=torch.float64).view(-1, *SHAPE)).flatten(1).T
    gain = covariance @ A.T @ torch.linalg.pinv(A @ covariance @ A.T + noise**2 * torch.eye(len(A)))
    return mean + gain @ (y.flatten() - A @ mean), covariance - gain @ A @ covariance


def prior(data: Blocks) -> torch.Tensor:
    block = data.basis @ torch.diag(data.variances) @ data.basis.T
    return torch.block_diag(*[block] * (SIZE // BLOCK))


@everything
@methods
@pytest.mark.parametrize("noise", [0.05, 0.7])
def test_the_estimate_is_the_posterior_mean(operator, method: str, noise: float) -> None:
    """E[x_0 | x_t, y]: x_t = α x_0 + σ ε is one more measurement."""
    wrap, data = METHODS[method]
    y = operator.apply(data.draw(1)) + noise
    x_t, t = normal((1, *SHAPE), 3, torch.float64), 400
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    mean = torch.full((SIZE,), data.mean, dtype=torch.float64)
    seen = posterior(mean, prior(data), Identity(), x_t / alpha, sigma / alpha)
    expected, _ = posterior(*seen, operator, y, noise)
    more = {"iterations": SIZE} if wrap is mmps else {}
    found = estimate_at(wrap(data.denoiser(SCHEDULE), SCHEDULE, operator, y, noise, **more), x_t, t)
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=1e-6)


@everything
@methods
def test_samples_have_the_posterior_mean_and_covariance(operator, method: str) -> None:
    """Sampling is affine in x_T, so the images of 0 and of a basis tell both, without chance."""
    wrap, data = METHODS[method]
    noise = 0.2
    y = operator.apply(data.draw(1)) + noise
    basis = torch.cat([torch.zeros(1, SIZE), torch.eye(SIZE)]).double().view(-1, *SHAPE)
    more = {"iterations": SIZE} if wrap is mmps else {}
    known = y.expand(len(basis), *y.shape[1:])
    denoiser = wrap(data.denoiser(SCHEDULE), SCHEDULE, operator, known, noise, **more)
    grid = timestep_grid(SCHEDULE, 40, "trailing")
    *_, last = run("dpmpp_2m", denoiser, basis, SCHEDULE, grid, lambda step: basis)
    found = last.x_t.flatten(1)
    root = (found[1:] - found[0]).T
    mean = torch.full((SIZE,), data.mean, dtype=torch.float64)
    expected, covariance = posterior(mean, prior(data), operator, y, noise)
    assert (found[0] - expected).abs().max() < 0.05
    assert (root @ root.T - covariance).abs().max() < 0.05


@everything
def test_without_noise_the_measurement_is_kept_and_the_rest_is_the_models(operator) -> None:
    """x̂ + A⁺(y − A x̂) (DDNM, eq. 12)."""
    data = Blocks(SHAPE)
    y, x_t = operator.apply(data.draw(2, 1)), normal((2, *SHAPE), 3, torch.float64)
    denoiser = data.denoiser(SCHEDULE)
    found = estimate_at(ddnm(denoiser, SCHEDULE, operator, y), x_t, 300)
    before = estimate_at(denoiser, x_t, 300)
    torch.testing.assert_close(operator.apply(found), y)
    moved = found - before  # nothing that A does not see, but by A⁺
    torch.testing.assert_close(operator.pseudo_inverse(operator.apply(moved)), moved)


@pytest.mark.parametrize("operator", [Identity(), Grey(), OPERATORS["mask"], OPERATORS["blur"]])
def test_exact_is_the_limit_of_little_noise(operator) -> None:
    data = Blocks(SHAPE)
    y, x_t = operator.apply(data.draw(2, 1)), normal((2, *SHAPE), 3, torch.float64)
    exact, nearly = (
        estimate_at(ddnm(data.denoiser(SCHEDULE), SCHEDULE, operator, y, noise), x_t, 300)
        for noise in (0, 1e-7)
    )
    torch.testing.assert_close(nearly, exact, rtol=1e-4, atol=1e-4)


def test_latents_are_corrected_by_what_changes_in_their_images() -> None:
    mixing = torch.linalg.qr(normal((SIZE, SIZE), 7, torch.float64)).Q

    def decode(z: torch.Tensor) -> torch.Tensor:
        return (z.flatten(1) @ mixing).view_as(z)

    def encode(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ mixing.T).view_as(x)

    data, operator = White(SHAPE), Grey()
    x_t, y = normal((1, *SHAPE), 3, torch.float64), operator.apply(data.draw(1))

    def in_latents(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return encode(data.denoiser(SCHEDULE)(decode(z), t))

    plain = ddnm(data.denoiser(SCHEDULE), SCHEDULE, operator, y, 0.1)
    wrapped = ddnm(in_latents, SCHEDULE, operator, y, 0.1, decode=decode, encode=encode)
    expected = estimate_at(plain, decode(x_t), 300)
    torch.testing.assert_close(decode(estimate_at(wrapped, x_t, 300)), expected)


@pytest.mark.parametrize("operator", [Grey(), Blur((24, 32), 1.5), Downsample((24, 32), (12, 16))])
def test_agree_brings_images_into_the_tolerance(operator) -> None:
    """Also where the image is black and white, so that much of what is added is clipped."""
    y = operator.apply(normal((2, 3, 24, 32), 1).sign())
    far = normal((2, 3, 24, 32), 2)
    found = agree(far, operator, y, 0.01)
    assert found.abs().max() <= 1
    assert (operator.apply(found) - y).abs().max() <= 0.02
    assert (found - far.clamp(-1, 1)).abs().max() > 0.1
    torch.testing.assert_close(agree(found, operator, y, 0.02), found, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(16, 16), (5, 40), (17, 16), (33, 47), (16, 64)])
def test_tiles_of_a_pointwise_denoiser_are_the_whole(size: tuple[int, int]) -> None:
    seen = []

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x_t.shape[-2:]))
        return 2 * x_t

    x = normal((2, 4, *size))
    torch.testing.assert_close(estimate_at(tiled(denoise, (16, 16)), x, 5), 2 * x)
    assert set(seen) == {tuple(min(side, 16) for side in size)}
