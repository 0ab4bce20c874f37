import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.guidance import guidance_context, guide
from latentdiff.diffusion.prediction import PREDICTIONS, target, to_x_0


class Counting:
    """A network whose answer tells the halves apart, and which counts the images it saw."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.batches.append(len(x))
        half = torch.arange(len(x)) >= len(x) // 2
        return x * torch.where(half, 2.0, 1.0)[:, None, None, None] + t[:, None, None, None] * 1e-3


x_t = torch.randn(3, 4, 5, 5)
t = torch.full((3,), 500)


def test_the_halves_are_extrapolated_in_one_pass() -> None:
    network = Counting()
    y = guide(network, 3.0)(x_t, t)
    torch.testing.assert_close(y, x_t + 3.0 * x_t + 0.5)
    assert network.batches == [6]


@pytest.mark.parametrize("scale", [1.0, 0.5, 0, [1.0, 0.0, 0.5]])
def test_up_to_scale_one_is_a_single_pass_without_the_unconditional_half(scale) -> None:
    network = Counting()
    y = guide(network, scale)(x_t, t)
    assert network.batches == [3] and torch.equal(y, Counting()(x_t, t))
    context, empty = torch.randn(3, 7, 2), torch.zeros(1, 7, 2)
    assert guidance_context(context, empty, scale) is context
    doubled = guidance_context(context, empty, 5.0)
    assert torch.equal(doubled[:3], empty.expand(3, 7, 2)) and torch.equal(doubled[3:], context)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_the_output_is_guiding_x_0(prediction: str) -> None:
    alpha, sigma, scale = 0.6, 0.8, 7.5
    x_t, uncond, cond = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64).unbind()

    def output(x_0: Tensor) -> Tensor:
        return target(prediction, x_0, (x_t - alpha * x_0) / sigma, alpha, sigma)

    y = guide(lambda x, t: torch.cat([output(uncond), output(cond)]), scale)(x_t, t[:2])
    guided = uncond + scale * (cond - uncond)
    torch.testing.assert_close(to_x_0(prediction, y, x_t, alpha, sigma), guided)


def test_full_rescale_restores_the_conditional_deviation_of_each_image() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        uncond, cond = x.chunk(2)
        return torch.cat([uncond.flip(-1), 2 * cond])

    dims = (1, 2, 3)
    y = guide(network, 7.5, rescale=1.0)(x_t, t)
    torch.testing.assert_close(y.std(dims), (2 * x_t).std(dims))
    plain = guide(network, 7.5)(x_t, t)
    half = guide(network, 7.5, rescale=0.5)(x_t, t)
    torch.testing.assert_close(half, 0.5 * y + 0.5 * plain)


def test_outside_the_interval_the_conditional_answer_stands() -> None:
    network, single = Counting(), Counting()
    outside = guide(network, 3.0, interval=(600, 900))(x_t, t)
    torch.testing.assert_close(outside, 2 * x_t + 0.5)
    inside = guide(network, 3.0, interval=(500, 900))(x_t, t)
    torch.testing.assert_close(inside, 4 * x_t + 0.5)
    guide(network, 3.0, interval=(600, 900), predict_conditional=single)(x_t, t)
    assert network.batches == [6, 6] and single.batches == [3]


@pytest.mark.parametrize("lowest", [1.0, 0.0, 0.5])
def test_each_image_may_have_its_own_scale(lowest: float) -> None:
    network = Counting()
    y = guide(network, [lowest, 3.0, 7.0], rescale=0.4)(x_t, t)
    assert network.batches == [6]
    for k, scale in enumerate((lowest, 3.0, 7.0)):
        alone = guide(Counting(), scale, rescale=0.4)(x_t[k : k + 1], t[:1])
        expected = 2 * x_t[k : k + 1] + 0.5 if scale <= 1 else alone  # off: conditional
        torch.testing.assert_close(y[k : k + 1], expected)
    assert guide(network, [1.0, 1.0, 1.0]) is network


@pytest.mark.parametrize("options", [{"rescale": 1.5}, {"interval": (900, 100)}])
def test_faulty_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="guidance"):
        guide(Counting(), 3.0, **options)
