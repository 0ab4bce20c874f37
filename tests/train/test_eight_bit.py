"""The 8-bit optimizer, where bitsandbytes is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from latentdiff.train.checkpoint import read_tensors, write_checkpoint
from latentdiff.train.optimizer import (
    OptimizerConfig,
    load_named_state,
    make_optimizer,
    named_state,
    step_if_finite,
)

CONFIG = OptimizerConfig(kind="adamw8bit", lr=1e-2)
needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 4))


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()
    step_if_finite(optimizer, torch.tensor(1.0))
    optimizer.zero_grad()


@needs_it
def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    straight, resumed = module(), module()
    first = make_optimizer(straight, CONFIG)
    for seed in range(3):
        descend(straight, first, seed)
    checkpoint = write_checkpoint(tmp_path, 3, {"optimizer": named_state(first, straight)}, {})
    resumed.load_state_dict(straight.state_dict())
    second = make_optimizer(resumed, CONFIG)
    load_named_state(second, resumed, read_tensors(checkpoint, "optimizer"))
    for seed in range(3, 6):
        descend(straight, first, seed)
        descend(resumed, second, seed)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_it
def test_its_moments_take_a_byte_each_and_it_learns() -> None:
    net = module()
    optimizer = make_optimizer(net, CONFIG)
    x = torch.randn(64, 128)
    before = float(net(x).square().mean())
    for seed in range(30):
        descend(net, optimizer, seed)
    assert float(net(x).square().mean()) < before
    assert optimizer.state[net[0].weight]["state1"].dtype == torch.uint8  # type: ignore[index]
