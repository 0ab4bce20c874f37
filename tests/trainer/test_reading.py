"""Showing cross-attention where to look: the loss in closed form, the start, what is learnt."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.models.attention import Attention
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.trainer.config import Given, TrainConfig, check_given
from latentdiff.trainer.drawing import patches
from latentdiff.trainer.reading import (
    Reading,
    ReadingConfig,
    check_reading,
    check_shape,
    map_loss,
    part_numbers,
    targets,
    told_attentions,
)
from latentdiff.trainer.reading_start import part_values, start_reading

SHAPE = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    block_out_channels=(24, 32),
    norm_num_groups=4,
    down_block_types=("DownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=64,
)
#: Patches of 4×4 places, 2 per side: at 8×8 places a part is a place and has 16 fellows.
COARSE = ReadingConfig(weight=1.0, grid=2, attentions=("up_blocks.0.attentions.0",))
FINE = ReadingConfig(
    weight=1.0, grid=4, attentions=("up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
)
TOKENS = 20


def drawing_states(count: int) -> tuple[Tensor, Tensor]:
    """States as a tower that draws has them, with the pictures (N, 3, 8, 8) that they say."""
    frame = torch.linalg.qr(torch.randn(64, 64)).Q
    pictures = torch.randn(count, 3, 8, 8)
    states = torch.randn(count, TOKENS, 64) @ frame[:, 40:].mm(frame[:, 40:].T) * 0.3
    said = patches(pictures, 2)  # (N, 16, 12)
    states[:, -16:] = said @ frame[:, :12].T + 3 * frame[:, 12:28].T
    states[:, 0] = 3 * frame[:, 28]
    return states, pictures


def test_parts_of_a_place() -> None:
    patch, part = part_numbers(8, 4)
    for place in range(64):
        row, column = divmod(place, 8)
        assert patch[place] == row // 2 * 4 + column // 2
        assert part[place] == row % 2 * 2 + column % 2


@pytest.mark.parametrize(("patch", "parts"), [(4, 4), (4, 2), (4, 1), (2, 2)])
def test_values_of_a_part_are_those_of_its_places(patch: int, parts: int) -> None:
    whole = torch.arange(3 * patch * patch).view(3, patch, patch)
    order, step = part_values(whole.numel(), patch, parts), patch // parts
    assert sorted(order.flatten().tolist()) == list(range(whole.numel()))
    for number in range(parts**2):
        row, column = number // parts * step, number % parts * step
        expected = whole[:, row : row + step, column : column + step].flatten()
        assert torch.equal(order[number], expected)


def test_loss_of_an_even_map_is_the_log_of_the_tokens() -> None:
    attention = Attention(24, 2, 64)
    torch.nn.init.zeros_(attention.to_q.weight)
    key, _ = attention.project(torch.randn(3, TOKENS, 64))
    loss = map_loss(attention, torch.randn(3, 64, 24), key, *targets(8, TOKENS, 4, 0, 2))
    assert loss.item() == pytest.approx(math.log(TOKENS), abs=1e-5)


def test_loss_is_zero_only_for_the_right_map() -> None:
    attention = Attention(2 * 24, 2, 64)  # heads as wide as there are tokens and more
    torch.nn.init.zeros_(attention.to_q.weight)
    patch, part = part_numbers(8, 4)
    key = 40 * torch.eye(24)[:TOKENS].expand(1, 2, -1, -1)
    right = torch.zeros(64, 2, 24)
    for place in range(64):
        for head in range(2):
            token = TOKENS - 16 + int(patch[place]) if part[place] == 2 + head else 0
            right[place, head, token] = 40
    attention.to_q = torch.nn.Identity()  # type: ignore[assignment]
    x = right.flatten(1)[None]
    mine, others = targets(8, TOKENS, 4, 2, 2), targets(8, TOKENS, 4, 0, 2)
    assert float(map_loss(attention, x, key, *mine)) < 1e-3
    assert float(map_loss(attention, x, key, *others)) > 10
    assert float(map_loss(attention, x.roll(1, 1), key, *mine)) > 10


def test_nothing_is_collected_without_weight_or_outside_training() -> None:
    unet, x, context = UNet(SHAPE), torch.randn(2, 2, 8, 8), torch.randn(2, TOKENS, 64)
    silent = Reading(unet, dataclasses.replace(COARSE, weight=0.0))
    reading = Reading(unet, COARSE)
    unet.eval()
    unet(x, 5, context)
    unet.train()
    with torch.no_grad():
        unet(x, 5, context)
    assert reading.loss() == 0.0
    unet(x, 5, context)
    assert float(reading.loss()) > 0
    assert reading.loss() == 0.0  # a loss is handed out once
    assert silent.loss() == 0.0


def test_heads_are_numbered_through_a_block() -> None:
    shape = dataclasses.replace(SHAPE, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    told = told_attentions(UNet(shape), FINE.attentions)
    assert [(t.first_head, t.heads, t.side(shape)) for t in told] == [(0, 4, 8), (2, 4, 8)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attentions": ("up_blocks.9.attentions.0",)}, "up_blocks.0.attentions.0"),
        ({"grid": 3}, "must divide the 4 places"),
        ({"grid": 1, "attentions": ("up_blocks.0.attentions.0",)}, "share the 16 parts"),
        ({"grid": 5}, "25 patches"),
    ],
)
def test_what_cannot_be_read_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_reading(UNet(SHAPE), dataclasses.replace(COARSE, **change), TOKENS)


def test_values_out_of_range_are_listed() -> None:
    problems = ReadingConfig(weight=-1.0, grid=0).validate()
    assert len(problems) == 3
    assert "differ" in ReadingConfig(attentions=("a", "a")).validate()[0]
    assert not ReadingConfig().validate()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", {"gradient_checkpointing": True}),
        ("model", {"compile": True}),
        ("data", {"buckets": True}),
    ],
)
def test_what_hides_or_stretches_the_maps_is_refused(part: str, change: dict[str, bool]) -> None:
    config = TrainConfig(reading=COARSE)
    config = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **change)}
    )
    with pytest.raises(UserError, match=next(iter(change))):
        check_given(Given(config, frozenset()))


def test_latents_of_another_size_are_refused() -> None:
    check_shape(UNet(SHAPE), FINE, (4, 8, 8))
    with pytest.raises(UserError, match="4 x 16"):
        check_shape(UNet(SHAPE), FINE, (4, 4, 16))
    check_shape(UNet(SHAPE), dataclasses.replace(FINE, weight=0.0), (4, 4, 16))


def test_start_fetches_every_place_for_queries_that_name_it() -> None:
    """With ideal queries the finest level's residual stream holds the picture."""
    torch.manual_seed(0)
    unet = UNet(SHAPE).init_for_training()
    states, pictures = drawing_states(300)
    error = start_reading(unet, FINE, states, patches(pictures, 2))
    assert error < 0.01
    patch, part = part_numbers(8, 4)
    found = torch.zeros(4, 64, 24)
    for told in told_attentions(unet, FINE.attentions):
        attention = told.attention
        width = 24 // attention.heads
        query = torch.zeros(64, attention.heads, width)
        for head in range(attention.heads):
            own = part == told.first_head + head
            query[own, head, :4] = torch.eye(4)[patch[own] // 4]
            query[own, head, 4:8] = torch.eye(4)[patch[own] % 4]
            query[~own, head, 8] = 1
        attention.to_q = torch.nn.Identity()  # type: ignore[assignment]
        found += attention(10 * query.flatten(1).expand(4, -1, -1), attention.project(states[:4]))
    slots = [0, 6, 12]  # one to a group of 6 channels
    assert (found[..., slots].mT.unflatten(2, (8, 8)) - pictures[:4]).square().mean() < 0.02
    for resnet in list(unet.up_blocks[1].resnets)[1:]:
        assert torch.equal(resnet.conv_shortcut.weight[slots, :, 0, 0], torch.eye(48)[slots])


def test_start_refuses_heads_without_room() -> None:
    narrow = dataclasses.replace(SHAPE, attention_head_dim=(4, 4))  # heads of 6 channels
    one = dataclasses.replace(FINE, attentions=FINE.attentions[:1])
    states, pictures = drawing_states(20)
    with pytest.raises(UserError, match="at least 9 channels"):
        start_reading(UNet(narrow), one, states, patches(pictures, 2))


def test_places_are_learnt() -> None:
    """From noise alone: the U-Net finds out where it is, and a held-out picture is fetched."""
    torch.manual_seed(0)
    unet = UNet(SHAPE).init_for_training()
    states, pictures = drawing_states(300)
    start_reading(unet, FINE, states, patches(pictures, 2))
    reading = Reading(unet.train(), FINE)
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    losses = []
    for step in range(120):
        rows = torch.arange(8) + 8 * step % 290
        unet(torch.randn(8, 2, 8, 8), torch.randint(1000, (8,)), states[rows])
        loss = reading.loss()
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 2
    assert sum(losses[-10:]) / 10 < 0.3
