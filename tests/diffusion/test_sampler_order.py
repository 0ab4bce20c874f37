"""Deterministic samplers approach the exact path at their order (`benchmarks/sampler_order`)."""

import sys
from pathlib import Path

import pytest

from latentdiff.diffusion.schedule import NoiseSchedule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from sampler_order import SCHEDULES, SOLVERS, errors, order


@pytest.mark.parametrize("data", ["Gaussian", "mixture"])
@pytest.mark.parametrize("row", SOLVERS)
def test_the_error_falls_at_the_claimed_order(row: str, data: str) -> None:
    steps = (32, 64, 128)
    found = errors(row, data, NoiseSchedule(SCHEDULES["scaled_linear"]), steps)
    slope = order(found, steps)
    print(f"{row}, {data}: errors {[f'{e:.1e}' for e in found]}, slope {slope:.2f}")
    claimed = SOLVERS[row][2]
    assert slope > (0.9 if claimed == 1 else 1.85)
    if row in ("euler", "ddim"):
        assert slope < 1.1
