"""What LoRA and DoRA do to a weight, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentdiff.models.low_rank import Layer, LowRank, add_to, beside, fits, nearest


def make(layer: Layer, rank: int = 3, alpha: float = 5.0, dora: bool = False) -> LowRank:
    shape = layer.weight.shape
    torch.manual_seed(1)
    return LowRank(
        torch.randn(rank, *shape[1:]),
        torch.randn(shape[0], rank, *[1] * (len(shape) - 2)),
        alpha,
        torch.rand(shape[0]) + 0.5 if dora else None,
    )


def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [
        nn.Linear(6, 4),
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False),
    ]


def test_lora_is_the_scaled_product() -> None:
    layer = layers()[0]
    change = make(layer)
    expected = 5 / 3 * torch.einsum("or,ri->oi", change.up, change.down)
    torch.testing.assert_close(change.delta(layer.weight), expected)


@pytest.mark.parametrize("number", range(4))
def test_dora_gives_every_output_channel_its_magnitude(number: int) -> None:
    layer = layers()[number]
    change, plain = make(layer, dora=True), make(layer)
    new = layer.weight + change.delta(layer.weight)
    torch.testing.assert_close(new.flatten(1).norm(dim=1), change.magnitude)
    direction = layer.weight + plain.delta(layer.weight)
    cosine = torch.cosine_similarity(new.flatten(1), direction.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(4))


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("dora", (False, True))
def test_beside_the_weight_is_the_same_as_in_it(number: int, dora: bool) -> None:
    layer = layers()[number]
    change, strength = make(layer, dora=dora), -0.7
    x = torch.randn(2, 5, 6) if number == 0 else torch.randn(2, 6, 8, 8)
    hook = layer.register_forward_hook(beside(change, layer, layer.weight, strength))
    hooked = layer(x)
    hook.remove()
    without = layer(x)
    add_to(layer.weight, strength * change.delta(layer.weight))
    torch.testing.assert_close(layer(x), hooked, rtol=1e-5, atol=1e-5)
    assert (without - hooked).abs().max() > 0.1


@pytest.mark.parametrize("number", range(4))
def test_the_nearest_lora_leaves_out_the_smallest_singular_values(number: int) -> None:
    weight = layers()[number].weight
    delta = make(layers()[number], dora=True).delta(weight)
    values = torch.linalg.svdvals(delta.flatten(1))
    for rank in (1, 2, 9):
        change = nearest(delta, rank)
        assert fits(change, weight) and change.rank == min(rank, len(values))
        off = (change.delta(weight) - delta).norm()
        torch.testing.assert_close(off, values[rank:].norm(), atol=1e-5, rtol=1e-4)


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.zeros(4, 6)
    weight[1:] = torch.randn(3, 6)
    change = LowRank(torch.randn(2, 6), torch.zeros(4, 2), 2.0, torch.ones(4))
    delta = change.delta(weight)
    assert torch.equal(delta[0], torch.zeros(6))
    torch.testing.assert_close((weight + delta)[1:].norm(dim=1), torch.ones(3))


def test_what_fits() -> None:
    linear, one, three, _ = layers()
    assert fits(make(linear), linear.weight)
    assert fits(make(linear), one.weight), "a 1×1 convolution is a matrix"
    assert not fits(make(linear), three.weight)
    assert not fits(make(three), nn.Linear(6, 5).weight)
    change = make(linear)
    assert not fits(LowRank(change.down, change.up[:, :2], 5.0), linear.weight)
