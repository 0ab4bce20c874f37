"""Every sampler against diffusers' scheduler on the same network, start and noise, in float32.

    python benchmarks/sampler_parity.py [--page docs/samplers.md]

Relative difference of the results, ‖ours − theirs‖ / ‖theirs‖, over {eps, v, x0, flow} × {linear,
scaled_linear, cosine, zero terminal SNR, flow} × {10, 25, 50} steps × the grids of each scheduler.
Cells that diffusers lacks, or that mean something else there, are counted with the reason.
--page writes the table between the two comments of the page that enclose it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from sampler_peers import (
    BROKEN,
    EVEN,
    KEEPS_SIGNAL,
    MULTISTEP_PEERS,
    PEERS,
    SCHEDULES,
    STEPS,
    TYPES,
    Cell,
    cells,
    reason_against,
)
from torch import Tensor

from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.samplers import as_denoiser, get_sampler, sample, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule

SHAPE = (2, 4, 8, 8)
LIMIT = 1e-4


def network(schedule: NoiseSchedule, prediction: str) -> Callable[[Tensor, float], Tensor]:
    """A small nonlinear network that mixes channels and neighbours and depends on t.

    Its opinion is an image of values up to ±1.3, told as the prediction, so that the state stays of
    order 1 as with a trained network.
    """

    @functools.cache
    def levels(t: float) -> tuple[float, float]:
        return float(schedule.alpha(t)), float(schedule.sigma(t))

    def answer(x: Tensor, t: float) -> Tensor:
        mixed = 0.4 * x + 0.2 * x.roll(1, 1) - 0.2 * x.roll(1, 3) * (1 - t / 1000)
        image = 1.2 * torch.tanh(mixed) + 0.1 * torch.sin(x.roll(2, 2) + 5 * t / 1000)
        alpha, sigma = levels(t)
        return target(prediction, image, (x - alpha * image) / sigma, alpha, sigma)

    return answer


def noise(step: int) -> Tensor:
    """The injected noise."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + step))


def scheduler_of(cell: Cell) -> Any:
    """diffusers' scheduler, with its steps set."""
    import diffusers

    peer, config = cell.peer, SCHEDULES[cell.schedule]
    if cell.schedule == "flow":
        kind = getattr(diffusers, peer.flow + "Scheduler")
        n = cell.steps
        if peer.flow in ("FlowMatchEulerDiscrete", "FlowMatchLCM"):
            scheduler = kind()
            scheduler.set_timesteps(n, sigmas=[1 - k / n for k in range(n)])
            return scheduler
        if peer.flow == "FlowMatchHeunDiscrete":
            scheduler = kind()
        else:
            fields = {"use_flow_sigmas": True, "prediction_type": TYPES[cell.prediction]}
            scheduler = kind(**fields, **dict(peer.fields))
        scheduler.set_timesteps(n)
        return scheduler
    fields = {
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "squaredcos_cap_v2" if config.kind == "cosine" else config.kind,
        "prediction_type": TYPES[cell.prediction],
        **dict(peer.fields),
    }
    if config.zero_terminal_snr:
        fields["rescale_betas_zero_snr"] = True
    if peer.name in ("DDPM", "DDIM", "LCM", "HeunDiscrete"):
        fields["clip_sample"] = False
    if cell.grid in EVEN:
        fields |= {"timestep_spacing": cell.grid, "steps_offset": 1}
    elif cell.grid != "lcm":
        fields[f"use_{cell.grid}_sigmas"] = True
        if peer.name in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete"):
            fields["timestep_spacing"] = "linspace"  # these spread over the range of the grid
    scheduler = getattr(diffusers, peer.scheduler)(**fields)
    scheduler.set_timesteps(2 * cell.steps if peer.name == "DPMSolverSinglestep" else cell.steps)
    return scheduler


def schedule_of(cell: Cell, scheduler: Any, own_tables: bool = False) -> NoiseSchedule:
    """Our schedule on diffusers' float32 table, so that what is compared is the sampler.

    The tables themselves are compared in tests/diffusion/test_schedule.py. In theirs 1 − β has lost
    up to 3 digits at the ends, and a zero ᾱ may be 2⁻²⁴ (the samplers marked clamped).
    """
    schedule = NoiseSchedule(SCHEDULES[cell.schedule])
    clamped = cell.schedule == "zero SNR" and cell.peer.zero_snr == "clamped"
    if cell.schedule != "flow" and (clamped or not own_tables):
        table = torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double()
        schedule._alpha_bar, schedule._log_ratio = table, ((1 - table) / table).log() / 2
    return schedule


def lost_digits(cell: Cell) -> bool:
    """Whether theirs must run in float64: its state x/α ≈ 2·10⁴ cancels to 1 in the first step."""
    far = cell.schedule == "cosine" and cell.grid not in KEEPS_SIGNAL
    return far and cell.peer.noisy_ratio_space


def run_theirs(cell: Cell, scheduler: Any, model: Any, x_T: Tensor, alpha: float) -> Tensor:
    """diffusers' result from the same start."""
    peer = cell.peer
    in_ratio = peer.noisy_ratio_space and cell.schedule != "flow"
    x = x_T / alpha if in_ratio else x_T
    times = scheduler.timesteps
    if peer.name == "DPMSolverSinglestep":
        times = times[:-2]  # its last steps are of first order
    module: Any = importlib.import_module(type(scheduler).__module__)
    original = getattr(module, "randn_tensor", None)
    try:
        for step, t in enumerate(times):
            extra = {"variance_noise": noise(step)} if peer.draws == "argument" else {}
            if peer.name == "DDIM":
                extra["eta"] = dict(peer.options).get("eta", 0.0)
            if peer.draws == "patch":
                last = step == len(times) - 1  # Algorithm 2 adds none at the end
                drawn = torch.zeros(SHAPE) if last else noise(step)
                module.randn_tensor = lambda *_, z=drawn, **__: z
            seen = scheduler.scale_model_input(x, t) if in_ratio else x
            x = scheduler.step(model(seen, float(t)), t, x, **extra).prev_sample
    finally:
        if original is not None:
            module.randn_tensor = original
    if in_ratio:  # what they hand over is x/α, at the clean image x
        x = x / (1 + float(scheduler.sigmas[-1]) ** 2) ** 0.5
    return x


def grid_of(cell: Cell, schedule: NoiseSchedule, scheduler: Any) -> Tensor:
    """Our grid of that name; for flow solvers whose grid we do not offer, theirs as a list."""
    if cell.schedule == "flow":
        if cell.peer.flow in ("FlowMatchEulerDiscrete", "FlowMatchLCM"):
            return timestep_grid(schedule, cell.steps)
        sigmas = scheduler.sigmas[:-1].double().tolist()
        return torch.tensor(list(dict.fromkeys(sigmas)), dtype=torch.float64) * 1000
    if cell.peer.noisy_ratio_space and cell.grid == "linspace":
        # Real timesteps, between which theirs interpolates σ/α and ours its logarithm.
        ratios = list(dict.fromkeys(scheduler.sigmas[:-1].tolist()))
        # The last one, of float32, may lie below the first level by a rounding.
        found = [max(schedule.timestep_at(r), 0.0) for r in ratios]
        return torch.tensor(found, dtype=torch.float32)
    style = get_sampler(cell.sampler).grid
    if cell.peer.name == "DPMSolverSinglestep":
        return timestep_grid(schedule, 2 * cell.steps, cell.grid)[::2]
    return timestep_grid(schedule, cell.steps, cell.grid, 1, style=style)


def compare(cell: Cell, own_tables: bool = False) -> float | None:
    """The relative difference of one cell; None where diffusers' own grid is broken."""
    scheduler = scheduler_of(cell)
    repeated = len(scheduler.timesteps) - len(scheduler.timesteps.unique())
    if repeated and cell.peer.name in MULTISTEP_PEERS:
        return None
    schedule = schedule_of(cell, scheduler, own_tables)
    grid = grid_of(cell, schedule, scheduler)
    x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    plain = network(NoiseSchedule(SCHEDULES[cell.schedule]), cell.prediction)
    alpha = float(schedule.alpha(float(grid[0])))
    if lost_digits(cell):
        scheduler.sigmas = scheduler.sigmas.double()
        theirs = run_theirs(cell, scheduler, plain, x_T.double(), alpha)
    else:
        theirs = run_theirs(cell, scheduler, plain, x_T, alpha)
    # Several schedulers round what they tell the network, at the levels of a real timestep.
    told = scheduler.timesteps.double().unique()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nearest = (told - t[0].double()).abs().argmin()
        if abs(told[nearest] - t[0]) > 1:
            raise AssertionError(f"{cell}: the grids differ at {float(t[0])}")
        return plain(x, float(told[nearest]))

    options = dict(cell.peer.options)
    if cell.peer.name == "DPMSolverSinglestep":
        options["final_timestep"] = float(grid[-1])
        grid = grid[:-1]
    denoiser = as_denoiser(predict, schedule, cell.prediction)
    ours = sample(cell.sampler, denoiser, x_T, schedule, grid, noise, **options)
    return float((ours - theirs).norm() / theirs.norm())


def measure(
    steps: tuple[int, ...] = STEPS, own_tables: bool = False
) -> tuple[dict[tuple[str, str], list[float]], Counter[str]]:
    """(row, schedule) → differences, and how many cells each reason rules out."""
    found: dict[tuple[str, str], list[float]] = {}
    reasons: Counter[str] = Counter()
    for cell in cells(steps):
        why = reason_against(cell)
        if why:
            reasons[why] += 1
            continue
        difference = compare(cell, own_tables)
        if difference is None:
            reasons[BROKEN] += 1
            continue
        if not difference < LIMIT:
            print(f"ABOVE {LIMIT}: {tuple(cell)} {difference:.1e}", flush=True)
        found.setdefault((cell.row, cell.schedule), []).append(difference)
    return found, reasons


def table(found: dict[tuple[str, str], list[float]], reasons: Counter[str]) -> str:
    """The measurement as Markdown."""
    lines = [
        "| sampler | diffusers | " + " | ".join(SCHEDULES) + " |",
        "|---|---|" + "---|" * len(SCHEDULES),
    ]
    for row, peer in PEERS.items():
        parts = []
        for schedule in SCHEDULES:
            values = found.get((row, schedule))
            note = "¹" if schedule == "zero SNR" and peer.zero_snr == "clamped" else ""
            note += "²" if schedule == "cosine" and peer.noisy_ratio_space else ""
            parts.append(f"{max(values):.0e} ({len(values)}){note}" if values else "n/a")
        lines.append(f"| {row} | `{peer.scheduler}` | " + " | ".join(parts) + " |")
    values = [v for group in found.values() for v in group]
    lines += [
        "",
        f"{len(values)} comparisons, largest relative difference {max(values):.1e}; "
        f"{sum(v < LIMIT for v in values)} below {LIMIT:.0e}. "
        f"{sum(reasons.values())} cells are n/a:",
        "",
        *(f"- {count}: {why}" for why, count in reasons.most_common()),
    ]
    return "\n".join(lines)


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between the page's two marks."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, rest = page.read_text(encoding="utf-8").split(start)
    page.write_text(f"{before}{start}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    """Compare, print, write."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--own-tables", action="store_true", help="our float64 noise tables")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    found, reasons = measure(tuple(arguments.steps), arguments.own_tables)
    text = table(found, reasons)
    print(text)
    if arguments.page:
        write_between(arguments.page, "sampler parity", text)


if __name__ == "__main__":
    main()
