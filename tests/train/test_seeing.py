"""What a run measures of itself: FLOPs, memory, loss by quarter of the timesteps, W&B."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_training import arguments, make_parts
from torch import nn

from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.models.unet import UNet
from latentdiff.train import log as flops
from latentdiff.train.batches import to_device
from latentdiff.train.config import TrainConfig
from latentdiff.train.divergence import diagnose
from latentdiff.train.log import (
    Gauges,
    Tracker,
    count_flops,
    count_module_flops,
    measured_peak,
    peak_flops,
    peak_memory,
    read_environment,
    read_metrics,
    write_environment,
)
from latentdiff.train.loop import LoopConfig
from latentdiff.train.run import check_extras
from latentdiff.train.validation import ValidationLoss, by_quartile

CPU = torch.device("cpu")


def test_flops_of_layers_against_their_closed_forms() -> None:
    # Forward 2·in·out per row; backward twice that, once where the input needs no gradient.
    layer, x = nn.Linear(8, 16), torch.zeros(3, 8)
    assert count_module_flops(layer, x) == 2 * (2 * 3 * 8 * 16)
    assert count_module_flops(layer, x.requires_grad_()) == 3 * (2 * 3 * 8 * 16)
    conv, image = nn.Conv2d(4, 8, 3, padding=1), torch.zeros(1, 4, 5, 5, requires_grad=True)
    assert count_module_flops(conv, image) == 3 * (2 * 25 * 9 * 4 * 8)


def test_an_image_of_four_times_the_area_costs_four_times_as_much_without_attention() -> None:
    unet = UNet.from_config(
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "mid_block_type": None,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
        }
    )
    small, large = (count_flops(unet, (4, s, s), 5) for s in (8, 16))
    assert small > 10**6
    # The time embedding costs the same for both.
    assert large / small == pytest.approx(4, rel=0.05)
    assert next(unet.parameters()).device == CPU


def test_peak_is_the_data_sheet_s_where_known_and_measured_elsewhere(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, "bf16") == 989e12
    assert peak_flops(cuda, "no") == 67e12
    monkeypatch.setattr(flops, "measured_peak", lambda device, precision: 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "something new")
    assert peak_flops(cuda, "bf16") == 5.0
    assert 1e7 < measured_peak(CPU, "no", 64) < 1e14


def test_gauges_are_shares_of_what_there_is() -> None:
    found = Gauges(CPU, flops_per_image=3e9, peak=60e9)(5.0)
    assert found["mfu"] == 0.25
    assert found["peak_memory_mb"] == pytest.approx(peak_memory(CPU) / 2**20, rel=0.2)
    assert peak_memory(CPU) > 50 * 2**20  # torch alone is more


def test_quartiles_are_means_of_their_draws() -> None:
    losses, quarters = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 2, 3])
    assert by_quartile(losses, quarters) == [2.0, None, 5.0, 7.0]
    row = ValidationLoss(4.0, [2.0, None, 5.0, 7.0]).row()
    assert row == {
        "validation_loss": 4.0,
        "validation_loss_q1": 2.0,
        "validation_loss_q3": 5.0,
        "validation_loss_q4": 7.0,
    }


class FakeRun:
    """Notes what W&B was told."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, *names: str, **options: str) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_numbers_and_images_and_the_same_run_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, options = [FakeRun(), FakeRun()], list[dict[str, Any]]()
    fake: Any = ModuleType("wandb")
    fake.init = lambda **given: options.append(given) or runs[len(options) - 1]
    fake.Image = lambda pixels: ("image", pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoopConfig(max_steps=9, tensorboard=False, wandb="p")
    for _ in runs:
        tracker = Tracker(tmp_path, 0, config, True, {"loop": {}})
        tracker.write([{"step": 3, "loss": 0.5, "grad_norm": None}])
        tracker.image("samples", 3, torch.zeros(3, 4, 6, dtype=torch.uint8))
        tracker.close()
    assert runs[0].logged == [
        {"loss": 0.5, "step": 3},
        {"samples": ("image", (4, 6, 3)), "step": 3},
    ]
    assert (
        runs[0].finished and options[0]["project"] == "p" and options[0]["config"] == {"loop": {}}
    )
    assert options[0]["id"] == options[1]["id"] and options[1]["resume"] == "allow"


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_extras(TrainConfig())
    with pytest.raises(UserError, match=r"=p needs wandb.*latentdiff\[wandb\]'.*loop\.wandb=null"):
        check_extras(load_config(TrainConfig, None, ["loop.wandb=p"]))
    with pytest.raises(UserError, match=r"latentdiff\[8bit\].*optimizer\.kind=adamw"):
        check_extras(load_config(TrainConfig, None, ["optimizer.kind=adamw8bit"]))


def test_a_step_that_is_not_finite_does_not_stop_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = Tracker(tmp_path, 0, LoopConfig(max_steps=9), True)
    tracker.write([{"step": 1, "loss": None, "grad_norm": None, "lr": 0.1}])
    tracker.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_run_without_tensorboard_says_how_to_get_curves(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    for wanted in (False, True):
        Tracker(tmp_path, 0, LoopConfig(max_steps=9, tensorboard=wanted), True).close()
        assert ("pip install 'latentdiff[tracking]'" in capsys.readouterr().err) is wanted
    assert not (tmp_path / "tensorboard").exists()


def test_every_start_of_a_run_is_recorded(tmp_path: Path) -> None:
    write_environment(tmp_path, {"torch": "1"})
    write_environment(tmp_path, {"torch": "2"})
    assert [start["torch"] for start in read_environment(tmp_path)] == ["1", "2"]
    file = tmp_path / "environment.json"
    for damage in (b'[{"torch"', b"{}", b"5", b"[1]", b"\xff", b"[" * 100_000):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"environment\.json is damaged"):
            write_environment(tmp_path, {"torch": "3"})
        assert file.read_bytes() == damage


class HostTensor:
    """A tensor in ordinary memory, as far as moving it goes."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.did: list[Any] = []

    def pin_memory(self) -> "HostTensor":
        self.did.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> "HostTensor":
        self.did.append((device.type, non_blocking))
        return self


def test_batches_go_to_a_gpu_through_page_locked_memory_and_stay_on_a_cpu() -> None:
    tensor: Any = HostTensor()
    assert to_device(tensor, torch.device("cuda")).did == ["pinned", ("cuda", True)]
    plain = torch.ones(2)
    assert to_device(plain, CPU) is plain


NO_LOSS, NO_GRADIENT = {"loss": None}, {"loss": 2.0, "grad_norm": None}


@pytest.mark.parametrize(
    ("losses", "bad", "weight", "arithmetic", "said", "not_said"),
    [
        (
            (0.1, 0.4, 9.0),
            NO_LOSS,
            1.0,
            "no",
            ["0.1, 0.4, 9", "lower optimizer.lr (the rate was 0.5)"],
            [],
        ),
        (
            (0.1,) * 3,
            NO_GRADIENT,
            1.0,
            "fp16",
            ["its gradient overflowed", "loop.mixed_precision=bf16"],
            [],
        ),
        ((0.1,) * 3, NO_GRADIENT, 1.0, "bf16", ["no sign of divergence"], ["mixed_precision"]),
        ((0.1,) * 3, NO_LOSS, 1.0, "no", ["no sign of divergence"], ["mixed_precision"]),
        (
            (0.1,),
            NO_LOSS,
            1.0,
            "no",
            ["only step 1", "lower optimizer.lr"],
            ["no sign of divergence"],
        ),
        (
            (0.1,) * 3,
            NO_LOSS,
            1e18,
            "no",
            ["have grown to 1e+18 (c)", "lower optimizer.lr"],
            ["no sign"],
        ),
        (
            (0.1,),
            NO_LOSS,
            torch.inf,
            "no",
            ["no longer finite (c)", "lower optimizer.lr"],
            ["before this"],
        ),
        (
            (),
            NO_LOSS,
            torch.nan,
            "no",
            ["c", "broken before this run's first step"],
            ["optimizer.lr"],
        ),
        (
            (),
            NO_LOSS,
            1.0,
            "no",
            ["No step of this run was finite"],
            ["optimizer.lr", "mixed_precision"],
        ),
    ],
)
def test_the_diagnosis_fits_the_record_the_weights_and_the_arithmetic(
    losses: tuple[float, ...],
    bad: dict[str, Any],
    weight: float,
    arithmetic: str,
    said: list[str],
    not_said: list[str],
) -> None:
    weights = [("a", torch.ones(2)), ("b", torch.empty(0)), ("c", torch.tensor([0.0, -weight]))]
    rows = [
        {"step": n, "loss": loss, "grad_norm": 1.0, "lr": 0.5} for n, loss in enumerate(losses, 1)
    ]
    text = " ".join(diagnose(rows, bad, weights, arithmetic))
    assert all(words in text for words in said), text
    assert not any(words in text for words in not_said), text


@pytest.mark.slow
def test_a_run_writes_all_that_there_is_to_see(tmp_path: Path, image_folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
    from train_latent import main

    given = ["data.validation_share=0.3", "validation.samples=16", "validation.images=2"]
    given += ["validation.steps=2", "loop.tensorboard=true"]
    output = tmp_path / "run"
    assert main(arguments(make_parts(tmp_path / "parts"), image_folder, output, *given)) == 0
    rows = read_metrics(output / "metrics.jsonl")
    log_points = [row for row in rows if "mfu" in row]
    assert [row["step"] for row in log_points] == [2, 4, 6]
    for row in log_points:
        assert row["mfu"] > 0 and row["peak_memory_mb"] > 0 and row["skipped_steps"] == 0
        assert {"loss", "grad_norm", "lr", "images_per_second", "waiting"} <= set(row)
    held_out = next(row for row in rows if "validation_loss" in row)
    assert sum(f"validation_loss_q{n}" in held_out for n in range(1, 5)) >= 2
    names = sorted(p.name for p in (output / "samples").iterdir())
    assert names == ["step-00000006-raw.png", "step-00000006.png"]
    assert json.loads((output / "environment.json").read_text())[0]["torch"] == torch.__version__
    assert list((output / "tensorboard").glob("events*"))
