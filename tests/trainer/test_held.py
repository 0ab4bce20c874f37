"""Heads that are not trained in what they fetch, and all else that is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.trainer.held import HeldConfig, check_held, hold
from latentdiff.trainer.optimizer import OptimizerConfig, make_optimizer

NAME = "up_blocks.1.attentions.0"
HELD = HeldConfig((NAME,), 2)
SHAPE = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(4, 4),
    cross_attention_dim=12,
)


def parameters(unet: UNet) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in unet.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_held_heads_stay_and_the_rest_moves(kind: str) -> None:
    torch.manual_seed(0)
    unet = UNet(SHAPE).init_for_training().train()
    for parameter in unet.parameters():  # zero-initialised ends hand nothing on
        torch.nn.init.normal_(parameter, std=0.1)
    hold(unet, HELD)
    optimizer = make_optimizer(unet, OptimizerConfig(kind=kind, lr=1e-2, weight_decay=0.0))
    before = parameters(unet)
    for _ in range(3):
        noise = torch.randn(4, 2, 8, 8)
        said = unet(noise, torch.tensor([10, 200, 500, 999]), torch.randn(4, 5, 12))
        optimizer.zero_grad()
        (said - torch.randn_like(said)).square().mean().backward()
        optimizer.step()
    after = parameters(unet)
    block = f"{NAME}.transformer_blocks.0"
    held = {f"{block}.norm2.weight": 16, f"{block}.norm2.bias": 16}
    held |= {f"{block}.attn2.to_{part}.weight": 8 for part in "qkv"}
    for name, old in before.items():
        rows = held.get(name, 0)
        assert torch.equal(old[:rows], after[name][:rows]), name
        assert rows == len(old) or not torch.equal(old[rows:], after[name][rows:]), name


def test_nothing_is_held_by_default() -> None:
    unet = UNet(SHAPE)
    hold(unet, HeldConfig())
    check_held(unet, HeldConfig(), divided=True)
    assert all(p._backward_hooks is None for p in unet.parameters())


def test_what_cannot_be_held_is_refused() -> None:
    unet = UNet(SHAPE)
    check_held(unet, HELD, divided=False)
    with pytest.raises(UserError, match=r"held\.attentions: mid.* is no spatial transformer"):
        check_held(unet, HeldConfig(("mid",)), divided=False)
    with pytest.raises(UserError, match=r"held\.heads must be at most the 4 heads"):
        check_held(unet, HeldConfig((NAME,), 5), divided=False)
    with pytest.raises(UserError, match="cuts weights into shards"):
        check_held(unet, HELD, divided=True)
    assert "at least 1; got 0" in HeldConfig((NAME,), 0).validate()[0]
