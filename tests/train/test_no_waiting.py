"""Between log points the host never asks the device for a number.

On a GPU each such question (`_local_scalar_dense`, which .item(), float() and bool() end in) stops
the queue. There is no GPU here, so a dispatch mode follows every tensor that comes from the weights
or the batch, which would be on the device, and forbids the question about those. Timesteps and
schedule stay on the host; they may be looked at.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import TEXT_WIDTH
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from latentdiff.diffusion.objective import ObjectiveConfig, draw, per_sample_loss
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.models.unet import UNet
from latentdiff.train.batches import BatchShape, LatentBatch
from latentdiff.train.ema import Ema, PowerEmaConfig, PowerEmas
from latentdiff.train.log import Tracker, read_metrics
from latentdiff.train.loop import LoopConfig, OptimizerStep, training_loop
from latentdiff.train.optimizer import OptimizerConfig, make_optimizer, step_if_finite

SHAPE = (4, 8, 8)
OBJECTIVE, SCHEDULE = ObjectiveConfig(), NoiseSchedule(ScheduleConfig(zero_terminal_snr=True))


class AskedError(AssertionError):
    """The host wanted to know what is on the device."""


class NoQuestions(TorchDispatchMode):
    """Fails when a number that depends on `device_tensors` is read, while `strict` is set."""

    def __init__(self, device_tensors: Any) -> None:
        super().__init__()
        self.strict, self.operations, self.asked = True, 0, 0
        self._on_device = WeakTensorKeyDictionary()
        for tensor in device_tensors:
            self.follow(tensor)

    def follow(self, tensor: Tensor) -> None:
        self._on_device[tensor] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        depends = any(t in self._on_device for t in given)
        if depends and "_local_scalar_dense" in str(function):
            self.asked += 1
            if self.strict:
                raise AskedError(str(function))
        result = function(*args, **(kwargs or {}))
        if depends:
            self.operations += 1
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.follow(tensor)
        return result


def tiny_unet() -> UNet:
    torch.manual_seed(0)
    return UNet.from_config(
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


def make_batch(step: int, micro: int) -> LatentBatch:
    random = draw(0, range(2 * step, 2 * step + 2), SHAPE, OBJECTIVE, SCHEDULE)
    return LatentBatch(torch.randn(2, 8, 8, 8), torch.randn(2, 5, TEXT_WIDTH), random)


def run(folder: Path, steps: int, ask: bool = False) -> NoQuestions:
    """Train; the log points are after the first step and after the last."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    unet = tiny_unet()
    model, optimizer = accelerator.prepare(unet, make_optimizer(unet, OptimizerConfig()))
    optimizer_step = OptimizerStep(accelerator, model, optimizer, lambda step: 1e-3, 1.0, 1)
    ema, powers = Ema(unet, 0.99), PowerEmas(unet, PowerEmaConfig(every=10**6), folder, False)
    config = LoopConfig(max_steps=steps, log_every=steps, tensorboard=False)
    tracker = Tracker(folder, 0, config, True)
    loop = training_loop(
        optimizer_step, make_batch, BatchShape(2), config, tracker, lambda step, seconds: None
    )
    with NoQuestions([*unet.parameters(), *ema.average.values()]) as mode:
        for step, batch in loop:
            mode.strict = True
            for tensor in (batch.moments, batch.context, batch.draw.eps, batch.draw.posterior_eps):
                mode.follow(tensor)
            x_0 = batch.moments[:, :4] + batch.draw.posterior_eps
            loss = per_sample_loss(model, x_0, batch.context, batch.draw, SCHEDULE, OBJECTIVE)
            if ask:
                loss[0].item()
            step.backward(loss.mean())
            step.update()
            ema.update(step.number)
            powers.update(step.number)
            # After the first step and the last the loop logs: there the kept losses are read.
            mode.strict = 0 < step.number < steps - 1
    tracker.close()
    return mode


def test_steps_between_log_points_read_nothing_from_the_device(tmp_path: Path) -> None:
    assert run(tmp_path, 4).operations > 1000  # forward, backward, optimizer, averages
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] is not None for row in rows)


def test_the_watcher_would_see_an_item(tmp_path: Path) -> None:
    with pytest.raises(AskedError):
        run(tmp_path, 4, ask=True)


class Copies(TorchDispatchMode):
    """Collects copies from the host to the device that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []
        self.free = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if "_to_copy" in str(function) and str(kwargs.get("device")) == "meta":
            if args[0].device.type == "cpu" and not kwargs.get("non_blocking"):
                self.waiting.append(str(tuple(args[0].shape)))
            else:
                self.free += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_the_loss_needs_no_number_from_the_device_and_waits_for_no_copy(prediction: str) -> None:
    # The meta device has no numbers: every .item() on it is an error by itself.
    unet = tiny_unet().to("meta")
    random = draw(0, range(2), SHAPE, OBJECTIVE, SCHEDULE)
    x_0 = torch.empty(2, *SHAPE, device="meta")
    context = torch.empty(2, 5, TEXT_WIDTH, device="meta")
    objective: Any = ObjectiveConfig(prediction=prediction)  # type: ignore[arg-type]
    with Copies() as copies:
        per_sample_loss(unet, x_0, context, random, SCHEDULE, objective).mean().backward()
    assert copies.free and not copies.waiting
    assert all(p.grad is not None for p in unet.parameters() if p.requires_grad)


def test_the_fused_optimizer_decides_on_the_device() -> None:
    net = nn.Linear(3, 3)
    optimizer = make_optimizer(net, OptimizerConfig())
    net(torch.ones(1, 3)).sum().backward()
    norm = torch.tensor(torch.nan)
    with NoQuestions([*net.parameters(), norm]) as mode:
        step_if_finite(optimizer, norm)
    assert mode.operations and not mode.asked


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_no_step_of_sampling_reads_from_the_device(guidance: float) -> None:
    """That the latents are finite is asked once at the end, whatever the number of steps."""
    from latentdiff import pipeline

    model = pipeline._load()
    asked = []
    for steps in (2, 6):
        with NoQuestions(model.unet.parameters()) as mode:
            mode.strict = False
            options = {"guidance_scale": guidance, "output_type": "latent", "progress": False}
            model("a cat", num_inference_steps=steps, **options)
        assert mode.operations > 100 * steps
        asked.append(mode.asked)
    assert asked[0] == asked[1] <= 1
