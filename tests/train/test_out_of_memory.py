from types import SimpleNamespace
from typing import Any

import pytest
import torch
from random_models import TEXT_WIDTH
from torch import nn

from latentdiff.diffusion.objective import ObjectiveConfig, per_sample_loss
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.train.batches import BatchMaker, BatchShape, Order
from latentdiff.train.memory import fit_micro_batch, probe, reserve, smaller
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer


def fits_up_to(limit: int) -> Any:
    tried = []

    def attempt(images: int) -> None:
        tried.append(images)
        if images > limit:
            raise torch.OutOfMemoryError("out of memory")

    attempt.tried = tried  # type: ignore[attr-defined]
    return attempt


def test_the_micro_batch_is_halved_until_it_fits_and_the_samples_stay() -> None:
    shape, attempt = BatchShape(24, 2, processes=4, rank=3), fits_up_to(7)
    found = fit_micro_batch(attempt, shape)
    assert attempt.tried == [24, 12, 6]
    assert (found.per_process, found.accumulation, found.total) == (6, 8, shape.total)

    def samples(of: BatchShape) -> list[int]:
        ranks = [BatchShape(of.per_process, of.accumulation, 4, rank) for rank in range(4)]
        micro = [r.samples(5, m) for r in ranks for m in range(of.accumulation)]
        return sorted(n for part in micro for n in part)

    assert samples(found) == samples(shape)


def test_odd_micro_batches_are_divided_too_and_one_image_is_the_end() -> None:
    assert smaller(BatchShape(15)).per_process == 5
    assert smaller(BatchShape(7)) == BatchShape(1, 7)
    with pytest.raises(UserError, match="gradient_checkpointing"):
        fit_micro_batch(fits_up_to(0), BatchShape(4))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def attempt(images: int) -> None:
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        fit_micro_batch(attempt, BatchShape(4))


def test_a_process_that_fits_follows_one_that_does_not() -> None:
    answers = iter([False, True])
    found = fit_micro_batch(fits_up_to(99), BatchShape(8), lambda fits: next(answers))
    assert found == BatchShape(4, 2)


class FakeGpu:
    """An accelerator that says it is a GPU and runs on the CPU."""

    is_fsdp2 = False

    def __init__(self) -> None:
        self.device = SimpleNamespace(type="cuda")

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def test_the_probe_runs_the_training_loss_and_leaves_no_trace() -> None:
    unet = UNet.from_config(
        {
            "sample_size": 8,
            "block_out_channels": (8, 8),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": TEXT_WIDTH,
        }
    )
    optimizer = make_optimizer(unet, OptimizerConfig())
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    autoencoder = SimpleNamespace(latents_from_moments=lambda moments, eps: moments[:, :4])
    data: Any = SimpleNamespace(shape=(8, 8, 8))
    schedule = NoiseSchedule(ScheduleConfig())
    tokens = torch.zeros(1, 5, TEXT_WIDTH)
    objective, shape = ObjectiveConfig(), BatchShape(4)
    order, cpu = Order(range(4), 0), torch.device("cpu")
    make = BatchMaker(data, order, shape, lambda texts: tokens, objective, schedule, cpu)
    seen = []

    def watched(images: int) -> torch.Tensor:
        seen.append(images)
        if images > 2:
            raise torch.OutOfMemoryError("out of memory")
        batch = make.trial(images)
        x_0 = autoencoder.latents_from_moments(batch.moments, batch.draw.posterior_eps)
        return per_sample_loss(unet, x_0, batch.context, batch.draw, schedule, objective).mean()

    found = probe(unet, watched, optimizer, shape, FakeGpu())  # type: ignore[arg-type]
    assert (found, seen) == (BatchShape(2, 2), [4, 2])
    assert all(p.grad is None for p in unet.parameters()) and not optimizer.state
    assert all(torch.equal(v, before[n]) for n, v in unet.state_dict().items())


def test_room_is_kept_for_the_moments_until_they_are_there() -> None:
    net = nn.Linear(10, 10)
    optimizer = make_optimizer(net, OptimizerConfig())
    assert sum(t.nbytes for t in reserve(net, optimizer)) == 2 * 4 * 110
    net(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert reserve(net, optimizer) == []
