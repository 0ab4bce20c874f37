import numpy as np
import pytest
import torch

from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

DISCRETE = ["linear", "scaled_linear", "cosine"]
ALL = [*DISCRETE, "flow"]


def schedule_of(kind: str, **fields: object) -> NoiseSchedule:
    return NoiseSchedule(ScheduleConfig(kind=kind, **fields))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("kind", DISCRETE)
def test_alpha_bar_is_that_of_diffusers(kind: str, steps: int, zero_snr: bool) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs = DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="squaredcos_cap_v2" if kind == "cosine" else kind,
        rescale_betas_zero_snr=zero_snr,
    ).alphas_cumprod
    ours = schedule_of(kind, num_train_timesteps=steps, zero_terminal_snr=zero_snr)
    difference = (ours.alpha_bar(torch.arange(steps)) - theirs.double()).abs().max().item()
    # What is left is diffusers' float32 product of up to 1000 factors.
    assert difference < 2e-6


@pytest.mark.parametrize("kind", DISCRETE)
def test_one_step_variances_compose_to_alpha_bar(kind: str) -> None:
    schedule = schedule_of(kind)
    steps = torch.arange(1000)
    product = torch.cumprod(1 - schedule.beta(steps), dim=0)
    torch.testing.assert_close(product, schedule.alpha_bar(steps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DISCRETE)
def test_variance_preserving_and_noisier_with_time(kind: str) -> None:
    schedule = schedule_of(kind)
    steps = torch.arange(-1, 1000)
    alpha, sigma = schedule.alpha(steps), schedule.sigma(steps)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)
    assert (schedule.noise_ratio(steps).diff() > 0).all()
    assert alpha[0] == 1 and sigma[0] == 0


def test_cosine_follows_its_defining_curve_until_the_clip() -> None:
    schedule = schedule_of("cosine")

    def curve(u: float) -> float:
        return float(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)

    for step in (0, 100, 500, 900):
        expected = curve((step + 1) / 1000) / curve(0)
        assert schedule.alpha_bar(step).item() == pytest.approx(expected, rel=1e-12)
    assert schedule.beta(999).item() == pytest.approx(0.999, rel=1e-9)


@pytest.mark.parametrize("kind", DISCRETE)
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step(kind: str) -> None:
    plain, rescaled = schedule_of(kind), schedule_of(kind, zero_terminal_snr=True)
    assert rescaled.alpha(999) == 0 and rescaled.snr(999) == 0
    assert rescaled.alpha(0).item() == pytest.approx(plain.alpha(0).item(), rel=1e-15)
    assert rescaled.ends_in_pure_noise and not plain.ends_in_pure_noise


def test_flow_is_the_straight_line() -> None:
    schedule = schedule_of("flow")
    t = torch.tensor([0.0, 250.0, 1000.0])
    assert schedule.alpha(t).tolist() == [1, 0.75, 0]
    assert schedule.sigma(t).tolist() == [0, 0.25, 1]
    assert schedule.ends_in_pure_noise


@pytest.mark.parametrize("kind", ALL)
def test_a_thousand_single_steps_are_one_jump(kind: str) -> None:
    """q_step repeated T times gives q(x_T | x_0) in mean and variance."""
    schedule = schedule_of(kind)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.tensor([2.0, -1.0]).repeat_interleave(40_000).reshape(2, 1, 200, 200)
    x = x_0
    for t in range(schedule.clean_timestep + 1, 601):
        x = schedule.q_step(x, torch.randn(x.shape, generator=generator), t)
    check_moments(x, schedule, 600)
    for t in range(601, schedule.last_timestep + 1):
        x = schedule.q_step(x, torch.randn(x.shape, generator=generator), t)
    check_moments(x, schedule, schedule.last_timestep)


def check_moments(x: torch.Tensor, schedule: NoiseSchedule, t: int) -> None:
    alpha, variance = schedule.alpha(t).item(), schedule.sigma(t).item() ** 2
    for image, value in zip(x, (2.0, -1.0), strict=True):
        error = (image.mean().item() - alpha * value) / (variance / image.numel()) ** 0.5
        spread = (image.var().item() / variance - 1) / (2 / image.numel()) ** 0.5
        print(f"{schedule.config.kind} t={t}: mean off by {error:.2f}, variance {spread:.2f} s.e.")
        assert abs(error) < 4 and abs(spread) < 4


@pytest.mark.parametrize("kind", ALL)
def test_transitions_chain(kind: str) -> None:
    """q(x_t|x_s) after q(x_s|x_r) is q(x_t|x_r): scales multiply, variances add."""
    schedule = schedule_of(kind)
    first, second = schedule.transition(10, 300), schedule.transition(300, 800)
    whole = schedule.transition(10, 800)
    torch.testing.assert_close(first[0] * second[0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(second[0] ** 2 * first[1] + second[1], whole[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_real_timesteps_interpolate_between_their_neighbours(kind: str) -> None:
    schedule = schedule_of(kind)
    between = schedule.alpha_bar(torch.tensor([500.0, 500.5, 501.0]))
    assert between[0] > between[1] > between[2]
    assert between[0] == schedule.alpha_bar(500) and between[2] == schedule.alpha_bar(501)


def test_t_broadcasts_over_the_batch_and_keeps_its_shape() -> None:
    schedule = schedule_of("scaled_linear")
    assert schedule.alpha(3).shape == () and schedule.alpha(torch.zeros(2, 3)).shape == (2, 3)
    x_0, eps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([0, 500, 999])
    together = schedule.q_sample(x_0, eps, t)
    for i in range(3):
        alone = schedule.q_sample(x_0[i : i + 1], eps[i : i + 1], int(t[i]))
        torch.testing.assert_close(together[i : i + 1], alone)
    assert together.dtype == torch.float32
    assert schedule.q_sample(x_0.double(), eps.double(), t).dtype == torch.float64


@pytest.mark.parametrize(("kind", "t"), [("linear", 1000), ("linear", -2), ("flow", -0.5)])
def test_timesteps_outside_the_range_are_refused(kind: str, t: float) -> None:
    with pytest.raises(ValueError, match="timestep must lie in"):
        schedule_of(kind).alpha(t)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "cosin"}, "Did you mean 'cosine'"),
        ({"num_train_timesteps": 1}, "at least 2"),
        ({"beta_start": 0.1, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"kind": "flow", "zero_terminal_snr": True}, "does not apply to the flow"),
    ],
)
def test_faulty_configurations_say_what_is_wrong(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields)
