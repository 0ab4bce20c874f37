"""Measure again every figure of the docs that does not need a training, into one JSON.

python benchmarks/verify.py [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def seconds(code: str) -> float:
    """Wall time of a fresh Python that runs the code; the middle of five."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        found.append(time.perf_counter() - started)
    return round(sorted(found)[2], 3)


def start_up() -> dict[str, Any]:
    """Import time, the first picture from nothing beside diffusers' own, and a further one."""
    import cold_start

    from latentdiff.embedded import EMBEDDED_MODEL

    return {
        "python alone, s": seconds("pass"),
        "import latentdiff, s": seconds("import latentdiff"),
        **cold_start.measure(EMBEDDED_MODEL, 3),
    }


def samplers() -> dict[str, float]:
    """Largest difference between our posterior forms, in float64."""
    import torch

    from latentdiff.diffusion.posterior import posterior_mean, posterior_mean_from_eps
    from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

    schedule = NoiseSchedule(ScheduleConfig())
    x_0, eps = torch.randn(2, 64, 4, dtype=torch.float64)
    worst = 0.0
    for t in range(1, schedule.num_train_timesteps):
        x_t = schedule.q_sample(x_0, eps, t)
        difference = posterior_mean(x_t, x_0, t, schedule) - posterior_mean_from_eps(
            x_t, eps, t, schedule
        )
        worst = max(worst, float(difference.abs().max()))
    return {"posterior forms, largest difference": worst}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "verify.json")
    arguments = parser.parse_args()
    import loader
    import torch
    from embedded_parts import measure

    from latentdiff.embedded import EMBEDDED_MODEL

    figures: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **start_up(),
        **samplers(),
        "embedded parts": measure(EMBEDDED_MODEL),
        "loader": loader.measure(50_000, 20)[0],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
