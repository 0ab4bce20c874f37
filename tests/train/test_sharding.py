"""What sharding is made of, on one process; tests/test_sharded_runs.py runs it on several."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed, nn

from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig
from latentdiff.train.distributed import UNITS, is_sharded, local, prepare, rows, whole
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer
from latentdiff.train.parts import prefers_channels_last


def small_unet() -> UNet:
    return UNet(
        UNetConfig(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=1,
            norm_num_groups=4,
            cross_attention_dim=8,
        )
    )


def test_most_weights_are_in_units_and_every_unit_is_a_block_of_ours() -> None:
    unet = small_unet()
    inside = {
        id(p)
        for module in unet.modules()
        if type(module).__name__ in UNITS
        for p in module.parameters()
    }
    outside = {n for n, p in unet.named_parameters() if id(p) not in inside}
    assert {name.split(".")[0] for name in outside} == {
        "conv_in",
        "time_embedding",
        "conv_norm_out",
        "conv_out",
    }
    assert {type(module).__name__ for module in unet.modules()} >= set(UNITS)


def test_what_needs_whole_weights_is_refused() -> None:
    unet = small_unet()
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="channels_last"):
        prepare(SimpleNamespace(is_fsdp2=True), unet, make_optimizer(unet, OptimizerConfig()))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_rows_are_those_that_torch_gives_a_process(count: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole_tensor = torch.arange(14.0).reshape(7, 2)
    for rank in range(count):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        try:
            mesh = init_device_mesh("cpu", (count,))
            sharded = distribute_tensor(whole_tensor, mesh, [Shard(0)], src_data_rank=None)
            assert is_sharded(sharded)
            part = rows(sharded)
            assert part is not None
            assert torch.equal(local(sharded), whole_tensor[part])
        finally:
            distributed.destroy_process_group()


def test_plain_tensors_are_all_here() -> None:
    weight = nn.Linear(3, 2).weight
    assert not is_sharded(weight)
    assert rows(weight) is None
    assert torch.equal(whole(weight), weight)
    local(weight).fill_(2.0)
    assert bool((weight == 2).all())


@pytest.mark.parametrize(
    ("wanted", "precision", "sharded", "found"),
    [
        (None, "no", False, False),
        (None, "bf16", False, True),
        (None, "fp16", False, True),
        (None, "bf16", True, False),
        (False, "bf16", False, False),
        (True, "no", False, True),
        (True, "bf16", True, True),  # and then refused
    ],
)
def test_the_memory_layout_follows_the_arithmetic(
    wanted: bool | None, precision: str, sharded: bool, found: bool
) -> None:
    accelerator: Any = SimpleNamespace(is_fsdp2=sharded, mixed_precision=precision)
    assert prefers_channels_last(wanted, accelerator) is found
