import math
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.objective import (
    ObjectiveConfig,
    Weighting,
    draw,
    loss_weight,
    per_sample_loss,
)
from latentdiff.diffusion.prediction import to_eps, to_x_0
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

SHAPE = (4, 16, 16)
DISCRETE = NoiseSchedule(ScheduleConfig())
FLOW = NoiseSchedule(ScheduleConfig(kind="flow"))


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_sample_is_the_same_in_any_batch(
    schedule: NoiseSchedule, offset: float, sampling: str
) -> None:
    config = ObjectiveConfig(offset_noise=offset, timestep_sampling=sampling)
    whole = draw(3, range(100, 164), SHAPE, config, schedule)
    for indices in ([163], [101, 163], [163, 7, 100]):
        part = draw(3, indices, SHAPE, config, schedule)
        for row, index in enumerate(indices):
            if index >= 100:
                for field, other in zip(part, whole, strict=True):
                    assert torch.equal(field[row], other[index - 100])
    other_seed = draw(4, range(100, 164), SHAPE, config, schedule)
    assert not torch.equal(other_seed.eps, whole.eps)


def test_threads_draw_the_same_numbers() -> None:
    config = ObjectiveConfig(offset_noise=0.1, multires_noise=0.3)
    alone = draw(3, range(100, 175), SHAPE, config, DISCRETE)
    with ThreadPoolExecutor(3) as pool:
        shared = draw(3, range(100, 175), SHAPE, config, DISCRETE, pool)
    assert all(map(torch.equal, alone, shared))


def test_draws_are_distributed_as_they_should_be() -> None:
    config = ObjectiveConfig(condition_dropout=0.25)
    many = draw(0, range(4000), SHAPE, config, DISCRETE)
    assert many.t.dtype == torch.int64 and many.t.min() >= 0 and many.t.max() <= 999
    assert many.t.double().mean().item() == pytest.approx(499.5, abs=4 * 289 / 4000**0.5)
    assert many.drop.float().mean().item() == pytest.approx(0.25, abs=4 * 0.433 / 4000**0.5)
    for noise in (many.eps, many.posterior_eps):
        assert noise.dtype == torch.float32 and noise.shape == (4000, *SHAPE)
        assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
        assert abs(noise.var().item() - 1) < 4 * (2 / noise.numel()) ** 0.5
    cross = (many.eps * many.posterior_eps).mean().item()
    assert abs(cross) < 4 / many.eps.numel() ** 0.5


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
def test_timestep_distributions(schedule: NoiseSchedule) -> None:
    for sampling, deviation in (("uniform", 12**-0.5), ("logit_normal", 0.2083)):
        config = ObjectiveConfig(timestep_sampling=sampling)
        t = draw(1, range(4000), (1, 1, 1), config, schedule).t
        assert t.is_floating_point() == schedule.is_flow
        share = t.double() / 1000
        assert share.mean().item() == pytest.approx(0.5, abs=0.02)
        assert share.std().item() == pytest.approx(deviation, abs=0.01)
        if schedule.is_flow:
            assert t.min() > 0 and t.max() <= 1000


@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
def test_logit_normal_has_its_location_and_scale(schedule: NoiseSchedule) -> None:
    config = ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=-0.7, logit_std=0.5)
    t = draw(1, range(4000), (1, 1, 1), config, schedule).t.double()
    logits = ((t if schedule.is_flow else t + 0.5) / 1000).logit()
    assert logits.mean().item() == pytest.approx(-0.7, abs=4 * 0.5 / 4000**0.5)
    assert logits.std().item() == pytest.approx(0.5, rel=4 / 8000**0.5)


def test_dropout_ends_mean_never_and_always() -> None:
    for share in (0.0, 1.0):
        config = ObjectiveConfig(condition_dropout=share)
        drop = draw(0, range(500), (1, 1, 1), config, DISCRETE).drop
        assert drop.float().mean().item() == share


def test_offset_noise_shifts_whole_channels_and_changes_nothing_else() -> None:
    plain = draw(0, range(500), SHAPE, ObjectiveConfig(), DISCRETE)
    offset = draw(0, range(500), SHAPE, ObjectiveConfig(offset_noise=0.3), DISCRETE)
    shift = offset.eps - plain.eps
    assert shift.flatten(2).std(-1).max() < 1e-6
    assert shift[..., 0, 0].std().item() == pytest.approx(0.3, rel=0.1)
    assert torch.equal(plain.t, offset.t) and torch.equal(plain.drop, offset.drop)


def test_weights_have_their_published_forms() -> None:
    t = torch.tensor([0, 200, 500, 999])
    snr = DISCRETE.snr(t)
    capped = snr.clamp(max=5.0)
    expected = {
        ("eps", "min_snr"): capped / snr,
        ("x0", "min_snr"): capped,
        ("v", "min_snr"): capped / (snr + 1),
        ("eps", "debiased"): snr.rsqrt(),
        ("x0", "soft_min_snr"): 1 / (1 / snr + 1 / 5),
        ("eps", "soft_min_snr"): 5 / (snr + 5),
        ("x0", "soft_flow"): 1 / ((1 / (snr.sqrt() + 1)).square() + 1 / 5),
        ("v", "none"): torch.ones_like(snr),
    }
    for (prediction, weighting), weight in expected.items():
        config = ObjectiveConfig(prediction=prediction, weighting=weighting)
        torch.testing.assert_close(loss_weight(t, DISCRETE, config), weight, rtol=1e-9, atol=0)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "soft_flow", "debiased"])
@pytest.mark.parametrize("schedule", [DISCRETE, FLOW])
def test_one_guess_has_one_loss_however_it_is_expressed(
    schedule: NoiseSchedule, weighting: str
) -> None:
    """A guess of x_0, told as eps, x0, v or flow, costs W(SNR) |x_0 error|² every time."""
    generator = torch.Generator().manual_seed(0)
    x_0, guess = torch.randn(2, 8, *SHAPE, generator=generator).unbind()
    losses = []
    for prediction in ("x0", "v", "flow") + (() if schedule.is_flow else ("eps",)):
        config = ObjectiveConfig(prediction=prediction, weighting=weighting)
        drawn = draw(0, range(8), SHAPE, config, schedule)
        a_b = {"x0": (1, 0), "eps": (0, 1), "flow": (-1, 1)}

        def model(x_t: Tensor, t: Tensor, context: None, prediction: str = prediction) -> Tensor:
            alpha = schedule.alpha(t)[:, None, None, None]
            sigma = schedule.sigma(t)[:, None, None, None]
            eps = (x_t - alpha * guess) / sigma
            a, b = a_b.get(prediction, (-sigma, alpha))  # noqa: B023
            return a * guess + b * eps

        losses.append(per_sample_loss(model, x_0, None, drawn, schedule, config))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_the_perfect_network_has_no_loss(prediction: str) -> None:
    schedule = FLOW if prediction == "flow" else DISCRETE
    config = ObjectiveConfig(prediction=prediction)
    x_0 = torch.randn(8, *SHAPE)
    drawn = draw(0, range(8), SHAPE, config, schedule)
    seen: dict[str, Tensor] = {}

    def model(x_t: Tensor, t: Tensor, context: str) -> Tensor:
        seen["x_t"], seen["t"] = x_t, t
        assert context == "context"
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        factor = [c[:, None, None, None].float() for c in (alpha, sigma)]
        choices = {
            "eps": drawn.eps,
            "x0": x_0,
            "flow": drawn.eps - x_0,
            "v": factor[0] * drawn.eps - factor[1] * x_0,
        }
        return choices[prediction]

    loss = per_sample_loss(model, x_0, "context", drawn, schedule, config)
    assert loss.shape == (8,) and loss.dtype == torch.float32 and loss.max() < 1e-9
    alpha, sigma = schedule.alpha(drawn.t), schedule.sigma(drawn.t)
    y = model(seen["x_t"], seen["t"], "context")
    found = to_x_0(prediction, y, seen["x_t"], alpha, sigma)
    torch.testing.assert_close(found, x_0, rtol=0, atol=2e-4)
    found = to_eps(prediction, y, seen["x_t"], alpha, sigma)
    torch.testing.assert_close(found, drawn.eps, rtol=0, atol=2e-4)


def test_half_precision_outputs_are_compared_in_float32() -> None:
    config = ObjectiveConfig(weighting="none")
    x_0 = torch.randn(2, *SHAPE)
    drawn = draw(0, range(2), SHAPE, config, DISCRETE)
    loss = per_sample_loss(lambda x, t, c: x.bfloat16(), x_0, None, drawn, DISCRETE, config)
    assert loss.dtype == torch.float32 and loss.isfinite().all()


def test_zero_terminal_snr_has_finite_weights() -> None:
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))
    for weighting in get_args(Weighting):
        for prediction in ("v", "x0", "flow"):
            config = ObjectiveConfig(prediction=prediction, weighting=weighting)
            weight = loss_weight(torch.arange(1000), schedule, config)
            assert weight.isfinite().all() and (weight >= 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction": "vv"}, "prediction must be one of"),
        ({"weighting": "min_sn"}, "Did you mean 'min_snr'"),
        ({"timestep_sampling": "unifrm"}, "Did you mean 'uniform'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"offset_noise": -0.1}, "offset_noise must be at least 0"),
        ({"condition_dropout": 1.5}, "condition_dropout must lie in"),
        ({"loss": "hubber"}, "Did you mean 'huber'"),
        ({"huber_delta": 0.0}, "huber_delta must be above 0"),
        ({"huber_delta": math.nan}, "huber_delta must be above 0"),
        ({"multires_noise": 1.1}, "multires_noise must lie in"),
        ({"logit_std": -1.0}, "logit_std must be above 0"),
        ({"logit_mean": math.inf}, "logit_mean must be a finite number"),
    ],
)
def test_faulty_configurations_say_what_is_wrong(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**fields)
