import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.train.optimizer import (
    OptimizerConfig,
    learning_rate,
    load_named_state,
    make_optimizer,
    named_state,
    step_if_finite,
)
from tests.random_models import UNET


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)).to(
        memory_format=torch.channels_last
    )


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    net(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_learning_rate_warms_up_and_follows_the_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, decay="cosine")
    rates = [learning_rate(step, config, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert learning_rate(10**6, OptimizerConfig(lr=2.0), 10) == 2.0


def test_the_whole_cosine_starts_with_the_first_step() -> None:
    config = OptimizerConfig(lr=2.0, warmup_steps=10, decay="whole_cosine")
    for step in (0, 4, 9, 10, 50, 99):
        warm, cosine = min(1, (step + 1) / 10), math.cos(math.pi * step / 100)
        assert learning_rate(step, config, 100) == 2.0 * warm * 0.5 * (1 + cosine)


def test_an_extended_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, decay="cosine")

    def rates(extend: Any, planned: int | None = 10, last: int = 30) -> list[float]:
        own = dataclasses.replace(config, extend=extend)
        return [learning_rate(step, own, last, planned) for step in range(last)]

    before = rates(None, None, 10)
    assert rates("restart") == before + rates(None, None, 20)
    assert rates("hold") == before + [1.0] * 20
    assert rates("decay") == rates(None, None, 30)


def test_biases_and_norms_do_not_decay() -> None:
    decays = {
        p.ndim >= 2: group["weight_decay"]
        for group in make_optimizer(module(), OptimizerConfig()).param_groups
        for p in group["params"]
    }
    assert decays == {True: 0.01, False: 0.0}


def test_the_fused_step_sees_gradients_as_their_channels_last_weights_lie() -> None:
    """torch's fused kernel walks memory: a gradient of another layout would move other weights."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNET | {"resnet_time_scale_shift": "scale_shift"}))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, UNET["cross_attention_dim"])
    plain = copy.deepcopy(unet)
    unet.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(unet, OptimizerConfig())
    with torch.autocast("cpu", torch.bfloat16):
        unet(x, 500, context).square().mean().backward()
    for ours, theirs in zip(unet.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        theirs.grad = ours.grad.clone(memory_format=torch.contiguous_format)
    assert not unet.conv_in.weight.is_contiguous()
    optimizer.step()
    groups = [{**g, "params": []} for g in optimizer.param_groups]
    for p in plain.parameters():
        groups[p.ndim < 2]["params"].append(p)
    torch.optim.AdamW(groups, fused=False).step()
    for ours, theirs in zip(unet.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = module()
    optimizer = make_optimizer(net, OptimizerConfig())
    descend(net, optimizer, 0)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    moments = {k: v.clone() for k, v in named_state(optimizer, net).items()}
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_if_finite(optimizer, torch.tensor(torch.nan))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(torch.equal(v, moments[k]) for k, v in named_state(optimizer, net).items())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    step_if_finite(optimizer, torch.tensor(1.0))
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_reloaded_state_continues_bit_for_bit() -> None:
    straight, resumed = module(), module()
    first = make_optimizer(straight, OptimizerConfig())
    for seed in range(3):
        descend(straight, first, seed)
    stored = {k: v.clone().contiguous() for k, v in named_state(first, straight).items()}
    resumed.load_state_dict(straight.state_dict())
    second = make_optimizer(resumed, OptimizerConfig())
    load_named_state(second, resumed, stored)
    for seed in range(3, 6):
        descend(straight, first, seed)
        descend(resumed, second, seed)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
