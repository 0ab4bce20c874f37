"""Tracking power-function averages during training and storing them now and then.

    OUTPUT/ema/step-00001000.safetensors      every average after 1000 optimizer steps, 16 bit

What the averages are, and how others are built from stored ones, is in `power_profile`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentdiff.atomic import atomic_file
from latentdiff.errors import UserError
from latentdiff.trainer.ema import Ema
from latentdiff.trainer.power_profile import (
    LONGEST,
    Profile,
    decay_of,
    fit,
    gamma_of,
    misfit,
)
from latentdiff.weight_files import refuse_not_finite, save_tensors

FOLDER = "ema"


@dataclass(frozen=True)
class PowerEmaConfig:
    """Averages from which `reconstruct_ema.py` builds one of any length after the run."""

    every: int = 0
    """Optimizer steps between stored averages; 0 tracks none. About 50 over the run are plenty."""
    sigma_rel: tuple[float, ...] = (0.05, 0.1)
    """Relative lengths that are tracked; two suffice. Each costs the weights' size in memory."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the stored averages; they are tracked in float32."""

    def validate(self) -> list[str]:
        """List what is out of range."""
        problems = [] if self.every >= 0 else [f"every must be at least 0; got {self.every}."]
        if self.every and not self.sigma_rel:
            problems.append("sigma_rel must name at least one length when every is above 0.")
        problems += [
            f"sigma_rel must lie above 0 and at most at {LONGEST:.4f}; got {value}."
            for value in self.sigma_rel
            if not 0 < value <= LONGEST
        ]
        return problems


class PowerEma(Ema):
    """One average of a relative length; forgets the first weights at the first step."""

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module, 0.0)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def decay_after(self, step: int) -> float:
        """β of the optimizer step `step`, counted from 0."""
        return decay_of(self.gamma, step + 1)


class PowerEmas:
    """All tracked averages of a run.

    Args:
        module: the (unwrapped) module.
        config: which averages, and how often they are stored.
        output: the run's folder.
        writes: whether this process writes the files.
    """

    def __init__(
        self, module: nn.Module, config: PowerEmaConfig, output: Path, writes: bool
    ) -> None:
        self._config, self._folder, self._writes = config, output / FOLDER, writes
        lengths = config.sigma_rel if config.every else ()
        self.tracks = [PowerEma(module, value) for value in lengths]
        self._stored = 0

    def update(self, step: int) -> None:
        """Move the averages after optimizer step `step` (from 0); store them when it is time."""
        for track in self.tracks:
            track.update(step)
        if self.tracks and (step + 1) % self._config.every == 0:
            self.store(step + 1)

    def store(self, step: int) -> None:
        """Write the averages after `step` steps, unless they are there; for all processes."""
        if not self.tracks or self._stored == step:
            return
        self._stored, dtype = step, getattr(torch, self._config.dtype)
        tensors = {
            f"{number}/{name}": _whole(value).to("cpu", dtype).contiguous()
            for number, track in enumerate(self.tracks)
            for name, value in track.placed().items()
        }
        refuse_not_finite(tensors)
        if self._writes:
            about = {"step": step, "sigma_rel": [track.sigma_rel for track in self.tracks]}
            _write(self._folder / f"step-{step:08d}.safetensors", tensors, about)


class AllAverages:
    """The run's own average and the power-function ones, as one thing to checkpoint.

    Attributes: average: the tensors of all, those of the power functions as `power-<n>/<name>`.
    """

    def __init__(self, ema: Ema, powers: PowerEmas) -> None:
        self._all: dict[str, Ema] = {"": ema}
        self._all |= {f"power-{number}/": track for number, track in enumerate(powers.tracks)}
        self.average = {p + n: t for p, one in self._all.items() for n, t in one.average.items()}

    def placed(self) -> dict[str, Tensor]:
        """The same as tensors that lie across the processes as the parameters do."""
        return {p + n: t for p, one in self._all.items() for n, t in one.placed().items()}

    def load(self, average: dict[str, Tensor]) -> None:
        """Take over stored averages.

        Raises: UserError: the run was begun without power-function averages, or with fewer.
        """
        missing = [name for name in self.average if name not in average]
        if missing:
            raise UserError(
                "the checkpoint has no power-function averages of these lengths, and they cannot "
                "be begun half-way. Go on with the power_ema.every and power_ema.sigma_rel that "
                f"the run began with, or with power_ema.every=0 (missing: {missing[0]})."
            )
        for name, value in self.average.items():
            value.copy_(average[name])


@dataclass(frozen=True)
class Snapshot:
    """One stored file."""

    path: Path
    """Where it is."""
    step: int
    """Optimizer steps made."""
    sigma_rel: tuple[float, ...]
    """Relative lengths of the averages in it, in order."""


def snapshots(run: Path) -> list[Snapshot]:
    """List what a run has stored, oldest first. Raises: UserError: nothing there, or damaged."""
    found = []
    for path in sorted((run / FOLDER).glob("step-*.safetensors")):
        with _opened(path) as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        if "step" not in about:
            raise UserError(f"{path} is not one of this program's stored averages. Remove it.")
        found.append(Snapshot(path, about["step"], tuple(about["sigma_rel"])))
    if not found:
        raise UserError(
            f"{run / FOLDER} holds no stored averages. They are written by a run with "
            "power_ema.every=N; other runs have only the one average in their model folder."
        )
    return found


@dataclass(frozen=True)
class Reconstruction:
    """Weights of an average that was never tracked."""

    weights: dict[str, Tensor]
    """Parameter name → float32."""
    step: int
    """The step at which the average ends."""
    misfit: float
    """Relative L² distance of its profile from the wanted one."""


def reconstruct(run: Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """Build the average of relative length `sigma_rel` that ends at `step` (None: the newest).

    Raises: UserError: nothing stored up to that step, or a length that does not exist.
    """
    stored = snapshots(run)
    step = stored[-1].step if step is None else step
    used = [s for s in stored if s.step <= step]
    if not used:
        raise UserError(
            f"nothing is stored up to step {step}; the first averages are of step {stored[0].step}."
        )
    profiles = [Profile(gamma_of(value), s.step) for s in used for value in s.sigma_rel]
    wanted = Profile(gamma_of(sigma_rel), step)
    coefficients = fit(profiles, wanted)
    weights = _combine(used, coefficients.tolist())
    return Reconstruction(weights, step, misfit(profiles, coefficients, wanted))


def _combine(used: list[Snapshot], coefficients: list[float]) -> dict[str, Tensor]:
    """Σ c_i θ̂_i, one parameter at a time, so that memory holds the weights once."""
    factors = iter(coefficients)
    with ExitStack() as stack:
        terms = [
            (stack.enter_context(_opened(s.path)), f"{number}/", next(factors))
            for s in used
            for number in range(len(s.sigma_rel))
        ]
        first, prefix, _ = terms[0]
        names = [key.removeprefix(prefix) for key in first.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {name: _sum(terms, name) for name in names}


def _sum(terms: list[tuple[Any, str, float]], name: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for file, prefix, factor in terms:
        total = total + factor * file.get_tensor(prefix + name).double()
    return total.float()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """safe_open, with damage reported as a UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it: the other stored averages suffice."
        ) from error
    with file:
        yield file


def _whole(value: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part only; every process has to call it."""
    gather = getattr(value, "full_tensor", None)
    return value.detach() if gather is None else gather()


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        save_tensors(tensors, new, {"about": json.dumps(about)})
