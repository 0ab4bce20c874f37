import pytest
import torch

from latentdiff.diffusion.prediction import (
    PREDICTIONS,
    check_prediction,
    target,
    to_eps,
    to_x_0,
)
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

CASES = [
    (kind, zero_snr, prediction)
    for kind, zero_snr in [
        ("linear", False),
        ("scaled_linear", False),
        ("scaled_linear", True),
        ("cosine", False),
        ("flow", False),
    ]
    for prediction in PREDICTIONS
    if not (prediction == "eps" and (zero_snr or kind == "flow"))
]


@pytest.mark.parametrize(("kind", "zero_snr", "prediction"), CASES)
def test_the_target_turns_back_into_image_and_noise(
    kind: str, zero_snr: bool, prediction: str
) -> None:
    schedule = NoiseSchedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero_snr))
    t = torch.tensor([1, 300, 700, schedule.last_timestep])
    x_0, eps = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = schedule.q_sample(x_0, eps, t)
    y = target(prediction, x_0, eps, alpha, sigma)
    torch.testing.assert_close(to_x_0(prediction, y, x_t, alpha, sigma), x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(to_eps(prediction, y, x_t, alpha, sigma), eps, rtol=0, atol=1e-9)


def test_targets_agree_with_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule = NoiseSchedule(ScheduleConfig())
    t = torch.tensor([0, 400, 999])
    x_0, eps = torch.randn(2, 3, 4, 5, 5).unbind()
    ours = target("v", x_0, eps, schedule.alpha(t), schedule.sigma(t))
    torch.testing.assert_close(ours, theirs.get_velocity(x_0, eps, t), rtol=0, atol=1e-5)
    noisy = theirs.add_noise(x_0, eps, t)
    torch.testing.assert_close(schedule.q_sample(x_0, eps, t), noisy, rtol=0, atol=1e-5)


def test_v_is_the_derivative_along_the_circle_and_flow_along_the_line() -> None:
    x_0, eps = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64).unbind()
    angle, step = torch.tensor(0.7, dtype=torch.float64), 1e-6
    ahead, behind = angle + step, angle - step
    slope = (ahead.cos() - behind.cos()) * x_0 + (ahead.sin() - behind.sin()) * eps
    v = target("v", x_0, eps, angle.cos(), angle.sin())
    torch.testing.assert_close(slope / (2 * step), v, rtol=0, atol=1e-8)
    torch.testing.assert_close(target("flow", x_0, eps, 0.3, 0.7), eps - x_0)


def test_x0_needs_no_noise_at_the_clean_end() -> None:
    y, x_t = torch.randn(2, 1, 1, 2, 2).unbind()
    assert torch.equal(to_x_0("x0", y, x_t, 1.0, 0.0), y)


def test_coefficients_may_be_numbers_or_one_per_image() -> None:
    y, x_t = torch.randn(2, 2, 1, 3, 3).unbind()
    each = torch.tensor([0.6, 0.6]), torch.tensor([0.8, 0.8])
    torch.testing.assert_close(to_x_0("v", y, x_t, *each), to_x_0("v", y, x_t, 0.6, 0.8))


@pytest.mark.parametrize("fields", [{"zero_terminal_snr": True}, {"kind": "flow"}])
def test_eps_is_refused_where_the_last_step_is_pure_noise(fields: dict) -> None:
    config = ScheduleConfig(**fields)
    with pytest.raises(ValueError, match=r"prediction 'eps' cannot be used with .*Set prediction"):
        check_prediction("eps", config)
    for prediction in ("v", "x0", "flow"):
        check_prediction(prediction, config)


def test_an_unknown_prediction_names_the_near_miss() -> None:
    with pytest.raises(ValueError, match=r"got 'epsi'\. Did you mean 'eps'"):
        check_prediction("epsi", ScheduleConfig())
