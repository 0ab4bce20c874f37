"""Two processes that each hold half of everything are one training."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "tests")]

import sharded_worker  # noqa: E402
import tiny_training  # noqa: E402
from launching import launch  # noqa: E402
from tiny_training import arguments, make_images, make_parts  # noqa: E402

from latentdiff.train.ema import reconstruct  # noqa: E402

pytestmark = pytest.mark.slow
WORKER = ROOT / "tests" / "sharded_worker.py"
SCRIPT = ROOT / "training" / "train_latent.py"
STEPS = 20
#: Events of a process that is not the first (see killing.py) before the second file of its second
#: checkpoint: 8 steps of two micro-batches and an update, 4 × log, 3 × save and sync, a file more.
EVENTS_TO_SECOND_CHECKPOINT = 8 * 3 + 2 + 6 + 1


def train(folder: Path, config: str, *options: str, **settings: int) -> list[dict[str, Any]]:
    """Launch the worker; return what its processes say, in order of rank."""
    run = launch(WORKER, [str(folder), json.dumps(settings)], config, *options)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, 20 steps of 8 images in two micro-batches."""
    folder = tmp_path_factory.mktemp("alone")
    found = sharded_worker.run(folder, {"steps": STEPS, "batch": 4, "accumulation": 2})
    assert (found["processes"], found["sharded"]) == (1, False)
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The same on two sharded processes."""
    folder = tmp_path_factory.mktemp("halves")
    said = train(folder, "fsdp2_cpu_2.yaml", steps=STEPS, batch=2, accumulation=2)
    return folder, said


def same_training(one: Path, two: Path, steps: int = STEPS) -> None:
    """Losses to 1e-5 and, after all steps, all averages of the weights to 1e-5."""
    ours, theirs = sharded_worker.losses(one), sharded_worker.losses(two)
    assert sorted(ours) == list(range(1, steps + 1))
    assert max(abs(ours[n] - theirs[n]) for n in ours) < 1e-5
    if steps == STEPS:
        for name in ("exported.safetensors", *(f"ema/step-{n:08d}.safetensors" for n in (10, 20))):
            a, b = (load_file(folder / name) for folder in (one, two))
            assert a.keys() == b.keys()
            assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5


def all_samples(said: list[dict[str, Any]], steps: range) -> list[list[int]]:
    """[step, global sample index, image] of all processes, in order."""
    return sorted(row for one in said for row in one["samples"] if row[0] in steps)


def test_each_process_holds_half_of_weights_moments_and_average(halves) -> None:
    _, said = halves
    assert len(said) == 2
    for one in said:
        assert (one["processes"], one["sharded"]) == (2, True)
        for what in ("weights", "moments", "average", "power averages"):
            here, total = one[what]
            assert 0.45 < here / total < 0.55, (what, here, total)
    for what in ("weights", "moments", "average", "power averages"):
        assert sum(one[what][0] for one in said) == said[0][what][1]


def test_the_halves_learn_what_one_process_learns(alone: Path, halves) -> None:
    same_training(halves[0], alone)


def test_averages_of_other_lengths_are_built_from_what_the_halves_stored(alone, halves) -> None:
    ours, theirs = (reconstruct(folder, 0.07) for folder in (halves[0], alone))
    assert (ours.step, ours.weights.keys()) == (STEPS, theirs.weights.keys())
    assert max(float((ours.weights[n] - w).abs().max()) for n, w in theirs.weights.items()) < 1e-5
    whole = load_file(halves[0] / "exported.safetensors")
    assert {name: w.shape for name, w in ours.weights.items()} == {
        name: w.shape for name, w in whole.items()
    }


def test_every_process_saves_its_half_and_torch_reads_them(halves, tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    checkpoint = halves[0] / "checkpoints" / f"step-{STEPS:08d}"
    kept = sorted(path.name for path in checkpoint.parent.iterdir())
    assert kept == ["step-00000008", "step-00000016", "step-00000020"]  # keep_last 1, keep_every 8
    for name in ("unet", "ema", "optimizer"):
        sizes = [path.stat().st_size for path in sorted(checkpoint.glob(f"{name}-*"))]
        assert len(sizes) == 2
        assert sizes[1] > 0.7 * sizes[0]
    for path in checkpoint.glob("ema-*"):
        shutil.copy(path, tmp_path)
    exported = load_file(halves[0] / "exported.safetensors")
    read = {k: torch.zeros(v.shape) for k, v in exported.items()}
    load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, value in read.items():
        torch.testing.assert_close(value, exported[name].float(), msg=name)


def test_two_then_one_then_two_processes_keep_the_order(alone: Path, tmp_path: Path) -> None:
    first = train(tmp_path, "fsdp2_cpu_2.yaml", steps=8, batch=2, accumulation=2)
    second = [sharded_worker.run(tmp_path, {"steps": 12, "batch": 2, "accumulation": 4})]
    assert second[0]["first step"] == 8
    third = train(tmp_path, "fsdp2_cpu_2.yaml", steps=STEPS, batch=4, accumulation=1)
    assert third[0]["first step"] == 12
    straight = [json.loads((alone / "rank-0.json").read_text())]
    for said, steps in ((first, range(8)), (second, range(8, 12)), (third, range(12, STEPS))):
        # The thread that prepares batches is a step or two ahead of the last one.
        assert all_samples(said, steps) == all_samples(straight, steps)
    same_training(tmp_path, alone)


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_one_process_dies_while_saving_and_the_launcher_goes_on(
    halves, tmp_path: Path, backend: str
) -> None:
    # The second process dies half-way through a file of its second checkpoint.
    fate = EVENTS_TO_SECOND_CHECKPOINT
    more = ["--max_restarts", "1", "--rdzv_backend", backend]
    settings = {"steps": STEPS, "batch": 2, "accumulation": 2, "dies at": fate, "late": 2}
    said = train(tmp_path, "fsdp2_cpu_2.yaml", *more, **settings)
    assert [one["first step"] for one in said] == [4, 4]
    assert sharded_worker.losses(tmp_path) == sharded_worker.losses(halves[0])
    ours, theirs = (load_file(f / "exported.safetensors") for f in (tmp_path, halves[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("fsdp2_shard_grad_op.yaml", "--num_processes 2"),
        (
            "fsdp2_hybrid.yaml",
            "--num_processes 4 --num_machines 1 --parallelism_config_dp_replicate_size 2 "
            "--parallelism_config_dp_shard_size 2",
        ),
    ],
)
def test_other_ways_to_shard(alone: Path, tmp_path: Path, config: str, options: str) -> None:
    count = int(options.split()[1])
    said = train(tmp_path, config, *options.split(), steps=4, batch=8 // count, accumulation=1)
    assert [one["processes"] for one in said] == [count] * count
    assert all(0.4 < one["weights"][0] / one["weights"][1] < 0.6 for one in said)
    assert len(list((tmp_path / "checkpoints/step-00000004").glob("unet-*"))) == 2
    same_training(tmp_path, alone, steps=4)


def test_the_script_in_bf16_saves_resumes_validates_and_exports(tmp_path: Path) -> None:
    parts, images = make_parts(tmp_path / "parts"), make_images(tmp_path / "images", 10)
    more = ["loop.mixed_precision=bf16", "loop.checkpoint_every=10", "loop.ema_decay=0.9"]
    more += ["data.validation_share=0.2", "validation.every=10", "validation.samples=4"]
    more += ["validation.steps=2", "validation.images=2", "optimizer.lr=1e-3"]
    alone, halves = tmp_path / "alone", tmp_path / "halves"
    from train_latent import main

    steps = ["loop.max_steps=10"], ["loop.max_steps=20", "--resume"]
    assert main([*arguments(parts, images, alone, *more), *steps[1][:1]]) == 0
    for extra in steps:
        given = [*arguments(parts, images, halves, *more), "loop.batch_size=2", *extra]
        run = launch(SCRIPT, given, "fsdp2_cpu_2.yaml")
        assert run.returncode == 0, run.stderr[-3000:]
    checkpoint = halves / "checkpoints" / "step-00000020"
    assert json.loads((checkpoint / "manifest.json").read_text())["processes"] == 2
    assert len(list(checkpoint.glob("unet-*-of-00002.safetensors"))) == 2
    ours, theirs = tiny_training.losses(halves), tiny_training.losses(alone)
    assert ours.keys() == theirs.keys() == set(range(1, 21))
    assert max(abs(ours[n] - theirs[n]) for n in ours) < 1e-3
    assert sorted(p.name for p in (halves / "samples").iterdir()) == [
        f"step-{step:08d}{kind}.png" for step in (10, 20) for kind in ("-raw", "")
    ]
    a, b = (
        load_file(f / "model/unet/diffusion_pytorch_model.safetensors") for f in (halves, alone)
    )
    assert a.keys() == b.keys()
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 5e-3
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(halves / "model", safety_checker=None)
