"""Measure again the figures that the docs quote and that need no training, into one JSON.

    python benchmarks/verify.py [--only NAME ...] [--output FILE.json]

Without --only all of them, which takes about two hours on two cores. The file is written after each
one, so an interrupted run keeps what it has; one that fails is reported and the others go on. A
training's own figures (losses, curves) are in its `metrics.jsonl` and are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def start_up() -> dict[str, Any]:
    """Import time, the first image from nothing beside diffusers' own, and a further one."""
    import cold_start

    from latentdiff.embedded import EMBEDDED_MODEL

    return {
        "python alone, s": seconds("pass"),
        "import latentdiff, s": seconds("import latentdiff"),
        **cold_start.measure(EMBEDDED_MODEL, 3),
    }


def seconds(code: str) -> float:
    """Wall time of a fresh Python that runs the code; the middle of five."""
    found = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        found.append(time.perf_counter() - started)
    return round(sorted(found)[2], 3)


def sizes() -> dict[str, Any]:
    """Parameters of the embedded model's parts, and bytes on disk."""
    from latentdiff.embedded import EMBEDDED_MODEL
    from latentdiff.formats.folder import load_components

    parts = load_components(EMBEDDED_MODEL)
    networks = {
        "U-Net": parts.unet,
        "autoencoder": parts.autoencoder,
        "text encoder": parts.text_encoder,
    }
    folders = [Path(EMBEDDED_MODEL) / name for name in ("unet", "vae", "text_encoder")]
    files = [path for folder in folders for path in folder.glob("*.safetensors")]
    found = {f"{name}, million parameters": _millions(part) for name, part in networks.items()}
    found["text encoder, tokens"] = parts.text_encoder.max_length
    found["weights on disk, MB"] = round(sum(p.stat().st_size for p in files) / 1e6, 1)
    return found


def _millions(part: Any) -> float:
    import torch

    modules = [part] if isinstance(part, torch.nn.Module) else vars(part).values()
    counts = [p.numel() for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters()]
    return round(sum(counts) / 1e6, 2)


def posterior() -> dict[str, float]:
    """Largest difference between the two forms of the posterior's mean, in float64."""
    import torch

    from latentdiff.diffusion.bounds import posterior_mean, posterior_mean_from_eps
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
    return {"largest difference": worst}


def averages() -> dict[str, float]:
    """How far averages that are built afterwards are from those asked for (docs/training.md)."""
    from latentdiff.train.ema import Profile, fit, gamma_of, misfit

    found = {}
    for files in (40, 8):
        steps = [1000 * (n + 1) for n in range(files)]
        stored = [Profile(gamma_of(length), step) for step in steps for length in (0.05, 0.1)]
        for length in (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25):
            wanted = Profile(gamma_of(length), steps[-1])
            distance = misfit(stored, fit(stored, wanted), wanted)
            found[f"{files} files, sigma_rel {length}: misfit, %"] = round(100 * distance, 2)
    return found


def loader() -> dict[str, Any]:
    """The loader alone and in a training, on a twentieth of the million."""
    import loader as benchmark

    return benchmark.measure(50_000, 20)[0]


def parity() -> dict[str, Any]:
    """Every sampler against diffusers' own."""
    import sampler_parity

    found, reasons = sampler_parity.measure()
    values = [value for group in found.values() for value in group]
    return {
        "comparisons": len(values),
        "largest relative difference": max(values),
        f"below {sampler_parity.LIMIT:.0e}": sum(v < sampler_parity.LIMIT for v in values),
        "n/a": sum(reasons.values()),
    }


def orders() -> dict[str, float]:
    """At which power of the step every sampler's error falls."""
    import sampler_order

    from latentdiff.diffusion.schedule import NoiseSchedule

    return {
        f"{row}, {data}, {kind}": round(
            sampler_order.order(sampler_order.errors(row, data, NoiseSchedule(config))), 2
        )
        for row in sampler_order.SOLVERS
        for kind, config in sampler_order.SCHEDULES.items()
        for data in sampler_order.DATA
    }


def of_script(script: str, *options: str, file: str = "") -> Callable[[], dict[str, Any]]:
    """The JSON that a script writes: to its --output, or to `file` in that folder."""

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) if file else Path(folder) / "figures.json"
            command = [sys.executable, str(ROOT / script), *options, "--output", str(target)]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            return json.loads((target / file if file else target).read_text(encoding="utf-8"))

    return run


class Measure(NamedTuple):
    """A group of figures: the page that quotes them, and what measures them again."""

    page: str
    run: Callable[[], dict[str, Any]]


EVALUATE = "inference/evaluate.py"
#: The quick ones first.
MEASURES = {
    "posterior": Measure("diffusion.md", posterior),
    "averages": Measure("training.md", averages),
    "sizes": Measure("embedded-model.md", sizes),
    "start-up": Measure("embedded-model.md", start_up),
    "orders": Measure("samplers.md", orders),
    "parity": Measure("samplers.md", parity),
    "inversion": Measure("generating.md", of_script("benchmarks/inversion.py")),
    "autoencoder-memory": Measure("generating.md", of_script("benchmarks/vae_memory.py")),
    "loader": Measure("data-at-scale.md", loader),
    "train-step": Measure("watching.md", of_script("benchmarks/train_step.py")),
    "likelihood": Measure(
        "likelihood.md", of_script(EVALUATE, "--likelihood", file="likelihood.json")
    ),
    "evaluation": Measure("embedded-model.md", of_script(EVALUATE, file="figures.json")),
}


def plain(value: Any) -> Any:
    """JSON has no NaN or infinity: their names."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def verify(names: list[str], output: Path) -> list[str]:
    """Measure the named groups and write each when it is there. Returns: those that failed."""
    import torch

    figures: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        measure, started = MEASURES[name], time.perf_counter()
        print(f"{name} (docs/{measure.page}) …", flush=True)
        try:
            found = plain(measure.run())
        except Exception as error:  # whatever it is, the others are measured
            failed.append(name)
            found = {"failed": f"{type(error).__name__}: {error}"}
        took = round(time.perf_counter() - started, 1)
        figures[name] = {"page": measure.page, "seconds it took": took, "figures": found}
        output.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "utf-8")
        print(json.dumps(found, indent=2, ensure_ascii=False), flush=True)
    return failed


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "verify.json")
    arguments = parser.parse_args()
    failed = verify(arguments.only, arguments.output)
    print(f"written to {arguments.output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
