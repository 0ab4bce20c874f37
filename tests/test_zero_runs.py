"""DeepSpeed's ZeRO-2 on two CPU processes is the training of one; runs where it is installed.

pip install 'latentdiff[deepspeed]', a C++ compiler, a minute for DeepSpeed to build a helper.
"""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import sharded_worker  # noqa: E402
from launching import launch  # noqa: E402

from latentdiff.trainer.tracking import read_metrics  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
STEPS = 20
#: DeepSpeed computes in 32 bit; a large eps keeps Adam from blowing rounding up to whole steps.
SETTINGS = {"dtype": "float32", "eps": 1e-3}


def train(folder: Path, **settings: int) -> list[dict[str, Any]]:
    """Launch two processes; return what they say, in order of rank."""
    worker, given = ROOT / "tests" / "sharded_worker.py", json.dumps(SETTINGS | settings)
    more = ["--num_processes", "2"]
    run = launch(
        worker, [str(folder), given], "deepspeed_zero2.yaml", *more, CUDA_VISIBLE_DEVICES=""
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """20 steps of 8 pictures on two processes, in two micro-batches."""
    folder = tmp_path_factory.mktemp("two")
    return folder, train(folder, steps=STEPS, batch=2, accumulation=2)


def test_moments_are_divided_and_weights_are_whole(two) -> None:
    for one in two[1]:
        assert (one["processes"], one["divided"], one["sharded"]) == (2, True, False)
        here, total = one["weights"]
        assert here == total
        assert 0.45 < one["moments"][0] / (2 * total) < 0.6  # pieces are padded to equal lengths


def test_it_is_the_training_of_one_process(two, tmp_path: Path) -> None:
    sharded_worker.run(tmp_path, SETTINGS | {"steps": STEPS, "batch": 4, "accumulation": 2})
    same_training(two[0], tmp_path)


def same_training(one: Path, other: Path) -> None:
    """Losses, averages and power-function averages to 1e-5."""
    ours, theirs = sharded_worker.losses(one), sharded_worker.losses(other)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    assert max(abs(ours[n] - theirs[n]) for n in ours) < 1e-5
    for name in ("exported.safetensors", f"ema/step-{STEPS:08d}.safetensors"):
        a, b = (load_file(folder / name) for folder in (one, other))
        assert a.keys() == b.keys()
        assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-5


def test_it_goes_on_bit_for_bit_and_on_one_process_too(two, tmp_path: Path) -> None:
    cut, alone = tmp_path / "cut", tmp_path / "alone"
    train(cut, steps=8, batch=2, accumulation=2)
    shutil.copytree(cut, alone)
    assert [one["first step"] for one in train(cut, steps=STEPS, batch=2, accumulation=2)] == [8, 8]
    assert sharded_worker.losses(cut) == sharded_worker.losses(two[0])
    ours, theirs = (load_file(f / "exported.safetensors") for f in (cut, two[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = sharded_worker.run(alone, SETTINGS | {"steps": STEPS, "batch": 8, "accumulation": 1})
    assert (found["first step"], found["processes"], found["divided"]) == (8, 1, False)
    same_training(alone, two[0])


def test_a_step_that_is_not_finite_changes_nothing(two, tmp_path: Path) -> None:
    train(tmp_path, steps=8, batch=2, accumulation=2, poisoned=3)
    found, clean = sharded_worker.losses(tmp_path), sharded_worker.losses(two[0])
    assert found[4] is None  # JSON has no NaN
    # The step before it is as ever, and the one after it starts from the same weights.
    assert [found[n] for n in (1, 2, 3)] == [clean[n] for n in (1, 2, 3)]
    assert all(math.isfinite(found[n]) for n in range(5, 9))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "skipped_steps" in row]
    assert rows[-1]["skipped_steps"] == 1
    weights = load_file(tmp_path / "exported.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())
