"""The order of every deterministic sampler, measured against exact answers in float64.

    python benchmarks/sampler_order.py [--page docs/samplers.md] [--plot docs/images/….png]

Between two finite noise levels with equal steps of λ, for Gaussian data (closed form) and for a
mixture of two (exact score; reference by scipy's DOP853 on dx̂/dr = (x̂ − D)/r, r = σ/α).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.samplers import sample
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig

#: Row → (sampler, options, order that its authors claim).
SOLVERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "euler": ("euler", {}, 1),
    "ddim": ("ddim", {}, 1),
    "heun": ("heun", {}, 2),
    "dpmpp_2m": ("dpmpp_2m", {}, 2),
    "dpmpp_2s_ancestral, η = 0": ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
    "unipc": ("unipc", {}, 2),
    "unipc, order 3": ("unipc", {"order": 3}, 2),
    "lms, order 2": ("lms", {"order": 2}, 2),
    "lms": ("lms", {}, 2),
    "pndm": ("pndm", {}, 1),
}
SCHEDULES = {"scaled_linear": ScheduleConfig(), "flow": ScheduleConfig("flow")}
STEPS = (16, 32, 64, 128, 256)
#: Noise ratios σ/α at the two ends.
START, END = 10.0, 0.1
Mean = Callable[[np.ndarray, float], np.ndarray]


def gaussian(x_hat: np.ndarray, r: float) -> np.ndarray:
    """E[x_0 | x̂] of data N(0.8, 0.5²), x̂ = x/α with noise r."""
    mean, variance = 0.8, 0.25
    return (variance * x_hat + r**2 * mean) / (variance + r**2)


def mixture(x_hat: np.ndarray, r: float) -> np.ndarray:
    """E[x_0 | x̂] of data 0.3 N(−1.2, 0.4²) + 0.7 N(0.9, 0.4²)."""
    means, variance = np.array([-1.2, 0.9]), 0.16
    logits = np.log([0.3, 0.7]) - (x_hat[..., None] - means) ** 2 / (2 * (variance + r**2))
    share = np.exp(logits - logits.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    each = (variance * x_hat[..., None] + r**2 * means) / (variance + r**2)
    return (share * each).sum(-1)


DATA: dict[str, Mean] = {"Gaussian": gaussian, "mixture": mixture}


def denoiser(mean: Mean, schedule: NoiseSchedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser (x_t, t) -> E[x_0 | x_t]."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
        return torch.from_numpy(mean(x_t.numpy() / alpha, sigma / alpha))

    return denoise


@functools.cache
def path(name: str, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """(x̂ at noise ratio `start`, x̂ at `end`) of 64 exact paths."""
    z = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    x_hat = 0.3 + z * math.sqrt(1 + start**2)
    if name == "Gaussian":
        return x_hat, 0.8 + (x_hat - 0.8) * math.sqrt((0.25 + end**2) / (0.25 + start**2))
    from scipy.integrate import solve_ivp

    mean = DATA[name]
    slope = lambda r, x: (x - mean(x, r)) / r  # noqa: E731
    solved = solve_ivp(slope, (start, end), x_hat, method="DOP853", rtol=1e-12, atol=1e-13)
    return x_hat, solved.y[:, -1]


def errors(
    row: str, data: str, schedule: NoiseSchedule, steps: tuple[int, ...] = STEPS
) -> list[float]:
    """Root mean square distance of x/α to the exact end, for each number of steps."""
    sampler, options, _ = SOLVERS[row]
    found = []
    for n in steps:
        ratios = np.exp(np.linspace(math.log(START), math.log(END), n + 1))
        grid = torch.tensor([schedule.timestep_at(r) for r in ratios], dtype=torch.float32)
        ends = grid[[0, -1]].double()
        (a_0, a_1), (r_0, r_1) = schedule.alpha(ends), schedule.noise_ratio(ends)
        x_hat, wanted = path(data, float(r_0), float(r_1))
        result = sample(
            sampler,
            denoiser(DATA[data], schedule),
            a_0 * torch.from_numpy(x_hat).reshape(1, 1, 8, 8),
            schedule,
            grid[:-1],
            torch.zeros,  # asked by none: the variance is 0
            final_timestep=float(grid[-1]),
            **options,
        )
        found.append(float(np.sqrt(np.mean(((result / a_1).flatten().numpy() - wanted) ** 2))))
    return found


def order(found: list[float], steps: tuple[int, ...] = STEPS) -> float:
    """The slope of the last two doublings."""
    return math.log(found[-3] / found[-1]) / math.log(steps[-1] / steps[-3])


def table(curves: dict[tuple[str, str, str], list[float]]) -> str:
    """Slopes as Markdown."""
    columns = [(s, d) for s in SCHEDULES for d in DATA]
    lines = [
        "| sampler | " + " | ".join(f"{d}, {s}" for s, d in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in SOLVERS:
        slopes = [f"{order(curves[row, s, d]):.2f}" for s, d in columns]
        lines.append(f"| {row} | " + " | ".join(slopes) + " |")
    return "\n".join(lines)


def plot(curves: dict[tuple[str, str, str], list[float]], path: Path) -> None:
    """Error against steps, one panel per data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(DATA), figsize=(10, 4), sharey=True)
    for panel, data in zip(panels, DATA, strict=True):
        for i, row in enumerate(SOLVERS):
            values = curves[row, "scaled_linear", data]
            slope = f"{row} ({order(values):.1f})"
            panel.loglog(STEPS, values, marker="osv^DPX<>*"[i], markersize=4, label=slope)
        panel.set(title=data, xlabel="steps")
        panel.set_xticks(STEPS, [str(n) for n in STEPS], minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=6)
    panels[0].set_ylabel("error")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    curves = {
        (row, kind, data): errors(row, data, NoiseSchedule(config))
        for row in SOLVERS
        for kind, config in SCHEDULES.items()
        for data in DATA
    }
    text = table(curves)
    print(text)
    if arguments.plot:
        plot(curves, arguments.plot)
    if arguments.page:
        from sampler_parity import write_between

        write_between(arguments.page, "sampler order", text)


if __name__ == "__main__":
    main()
