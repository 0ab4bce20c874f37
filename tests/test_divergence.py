"""A run that diverged fails: it exports nothing, keeps what was there, and says what helps."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

from launching import launch  # noqa: E402
from random_models import TEXT_WIDTH, make_pipeline  # noqa: E402
from tiny_training import make_images  # noqa: E402

from latentdiff.errors import UserError  # noqa: E402
from latentdiff.train.ema import Ema  # noqa: E402
from latentdiff.train.log import read_metrics  # noqa: E402

RESULTS = ("model", "lora/pytorch_lora_weights.safetensors", "learned_embeds.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and images."""
    folder = tmp_path_factory.mktemp("divergence")
    make_pipeline().save_pretrained(folder / "model")
    make_images(folder / "images", 6)
    return folder


def given(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model.pretrained={folder / 'model'}",
        "data.kind=folder",
        f"data.path={folder / 'images'}",
        "data.validation_share=0",
        f"latents.cache_dir={folder / 'cache'}",
        "optimizer.warmup_steps=0",
        "loop.mixed_precision=no",
        "loop.max_steps=6",
        "loop.batch_size=3",
        "loop.log_every=4",
        "loop.tensorboard=false",
        "validation.every=0",
        "validation.images=0",
        f"output={output}",
        *more,
    ]


def train(*arguments: str) -> int:
    from train_latent import main

    return main(list(arguments))


def files(folder: Path) -> dict[str, bytes]:
    """What a user would lose: results and checkpoints."""
    kinds = (".safetensors", ".json", ".pt")
    found = (path for path in sorted(folder.rglob("*")) if path.suffix in kinds)
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.stem != "environment"}


@pytest.mark.parametrize("kind", ["full", "lora", "textual_inversion"])
@pytest.mark.parametrize("steps", [1, 6])
def test_a_rate_far_too_high(
    kind: str, steps: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = [] if kind == "full" else [f"finetune.kind={kind}"]
    more = ["optimizer.lr=1e18", f"loop.max_steps={steps}", "export.dtype=float32"]
    assert train(*given(folder, tmp_path / "run", *method, *more)) == 2
    error = capsys.readouterr().err.split("error: ")[1]
    assert "has grown to" in error or "have grown to" in error
    assert "diverged" in error and "mixed_precision" not in error
    assert steps == 1 or "lower optimizer.lr (the rate was 1e+18)" in error
    assert not any((tmp_path / "run" / name).exists() for name in RESULTS)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def spoiled(real: Callable[..., Tensor], no_loss: set[int], no_gradient: set[int]) -> Any:
    """The loss, not finite in some calls (from 1), or with a gradient that is not."""
    calls = 0

    def loss(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        value = real(*given)
        if calls in no_gradient:
            value.register_hook(lambda gradient: gradient * torch.inf)
        return value * torch.nan if calls in no_loss else value

    return loss


@pytest.mark.parametrize(
    ("no_loss", "no_gradient", "message"),
    [
        (range(2, 7), (), "in the last 5 steps (now at step 8)"),
        (range(1, 7), (), "No step of this run was finite"),
        ((6,), (), "in the last step (now at step 8)"),
        ((), (5, 6), "its gradient overflowed"),
        ((), (6,), ""),
        ((2, 4), (1, 3), ""),
    ],
)
def test_steps_that_were_not_finite(
    no_loss: Any,
    no_gradient: Any,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import latentdiff.train.__main__ as script

    output = tmp_path / "run"
    assert train(*given(folder, output, "loop.max_steps=2")) == 0
    before = files(output)
    loss = spoiled(script.per_sample_loss, {*no_loss}, {*no_gradient})
    monkeypatch.setattr(script, "per_sample_loss", loss)
    code = train(*given(folder, output, "loop.max_steps=8"), "--resume")
    assert code == (2 if message else 0)
    bad = sorted({*no_loss, *no_gradient})
    rows = read_metrics(output / "metrics.jsonl")
    assert [r["step"] - 2 for r in rows if r["loss"] is None or r["grad_norm"] is None] == bad
    if message:
        assert message in capsys.readouterr().err
        assert files(output) == before
    else:
        after = files(output)
        assert "checkpoints/step-00000008/manifest.json" in after
        name = "model/unet/diffusion_pytorch_model.safetensors"
        assert after[name] != before[name]


@pytest.mark.parametrize(
    ("value", "more", "message"),
    [
        (torch.nan, (), "the average conv_in.weight is not finite"),
        (1e5, (), "the average conv_in.weight has grown to 1e+05"),
        (1e5, ("power_ema.every=1",), "beyond the largest of float16"),
    ],
)
def test_averages_that_broke(
    value: float,
    more: tuple[str, ...],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = Ema.update

    def update(self: Ema, step: int) -> None:
        real(self, step)
        self.average["conv_in.weight"][0] = value

    monkeypatch.setattr(Ema, "update", update)
    assert train(*given(folder, tmp_path / "run", "loop.max_steps=1", *more)) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path / "run") == {}


def _components(model: Path, value: float) -> Any:
    from latentdiff.formats.folder import load_components

    components = load_components(model)
    for module in (components.unet, components.autoencoder.module):
        next(module.parameters()).data[0] = value
    return components


def _folder(model: Path, target: Path, value: float) -> None:
    from latentdiff.formats.folder import save_components

    save_components(target, _components(model, value), torch.float16)


def _single_file(model: Path, target: Path, value: float) -> None:
    from latentdiff.formats.single_file import save_single_file

    save_single_file(f"{target}.safetensors", _components(model, value), torch.float16)


def _autoencoder(model: Path, target: Path, value: float) -> None:
    from latentdiff.formats.folder import save_autoencoder

    save_autoencoder(_components(model, value).autoencoder, target)


def _lora(model: Path, target: Path, value: float) -> None:
    from latentdiff.formats.lora import write_lora
    from latentdiff.models.low_rank import LowRank

    change = LowRank(torch.ones(2, 4), torch.full((4, 2), value), 2.0)
    write_lora(target / "a.safetensors", {"unet.proj": change}, dtype=torch.float16)


def _word(model: Path, target: Path, value: float) -> None:
    from latentdiff.formats.embedding import write_embedding

    wide = torch.full((1, TEXT_WIDTH), value, dtype=torch.float64) * 1e34  # written in float32
    write_embedding(target / "a.safetensors", "<a>", wide)


def _clip(model: Path, target: Path, value: float) -> None:
    from latentdiff.train.clip import ClipConfig, build_clip, save_clip, train_tokenizer

    shape = ClipConfig(600, 12, 32, 1, 2, 32, 1, 2, 8, 16)
    clip = build_clip(shape, train_tokenizer(["a"], 600, 12), 16)
    clip.text_projection.weight.data[0] = value
    save_clip(clip, target)


@pytest.mark.parametrize("write", [_folder, _single_file, _lora, _word, _autoencoder, _clip])
@pytest.mark.parametrize(
    ("value", "message"), [(1e6, "values beyond the largest of"), (torch.nan, "holds NaN")]
)
def test_no_file_takes_numbers_that_its_format_cannot_hold(
    write: Callable[[Path, Path, float], None],
    value: float,
    message: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    write(folder / "model", tmp_path / "out", 1.0)
    before = files(tmp_path)
    assert before
    with pytest.raises(UserError, match=message):
        write(folder / "model", tmp_path / "out", value)
    assert files(tmp_path) == before
    assert not [p.name for p in tmp_path.rglob(".*")]


STAGES = {
    "train_autoencoder": ["autoencoder.block_out_channels=[8,16]", "autoencoder.norm_num_groups=4"],
    "train_clip": [
        *("clip.text_width=32", "clip.text_layers=1", "clip.image_width=32", "clip.image_layers=1"),
        "clip.vocabulary=600",
    ],
}


def stage_arguments(script: str, folder: Path, output: Path) -> list[str]:
    return [
        *STAGES[script],
        "data.kind=folder",
        f"data.path={folder / 'images'}",
        "data.image_size=16",
        "optimizer.warmup_steps=0",
        "optimizer.decay=constant",
        "loop.mixed_precision=no",
        "loop.batch_size=3",
        "loop.log_every=3",
        "loop.tensorboard=false",
        f"output={output}",
    ]


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_that_diverges_keeps_its_state_and_its_result(
    script: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = runpy.run_path(str(ROOT / "training" / f"{script}.py"))["main"]
    common = stage_arguments(script, folder, tmp_path / "run")
    assert main([*common, "loop.max_steps=2"]) == 0
    before = files(tmp_path / "run")
    assert "checkpoints/step-00000002/manifest.json" in before and len(before) > 4
    capsys.readouterr()
    monkeypatch.setattr("latentdiff.train.run.learning_rate", lambda *given: 1e18)
    assert main([*common, "loop.max_steps=9", "--resume"]) == 2
    error = "error: " + capsys.readouterr().err.split("error: ")[1]
    assert error.count("\n") == 1
    assert "lower optimizer.lr (the rate was 1e+18)" in error and "mixed_precision" not in error
    assert files(tmp_path / "run") == before
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu_2.yaml", "fsdp2_cpu_2.yaml"])
def test_all_processes_end_alike(config: str, folder: Path, tmp_path: Path) -> None:
    script, output = ROOT / "training" / "train_latent.py", tmp_path / "run"
    wild = launch(script, given(folder, output, "optimizer.lr=1e18"), config)
    assert wild.returncode != 0 and not list((output / "checkpoints").iterdir())
    for where in ("error: ", "error (process 1): "):
        assert f"{where}the loss or its gradient was not finite" in wild.stderr
    output = tmp_path / "blocked"
    assert launch(script, given(folder, output), config).returncode == 0
    (output / "model").rename(output / "old")
    (output / "model").write_text("in the way")
    blocked = launch(script, [*given(folder, output), "--resume"], config)
    assert blocked.returncode != 0
    for where in ("error: ", "error (process 1): "):
        assert f"{where}cannot write a model folder" in blocked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_all_processes_of_a_stage_end_alike(script: str, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    wild = ["loop.max_steps=9", "optimizer.lr=1e18"]
    run = launch(
        ROOT / "training" / f"{script}.py",
        [*stage_arguments(script, folder, output), *wild],
        "ddp_cpu_2.yaml",
    )
    assert run.returncode != 0 and not list((output / "checkpoints").iterdir())
    for where in ("error: ", "error (process 1): "):
        assert f"{where}the loss or its gradient was not finite" in run.stderr
