"""A moving average of the weights, which samples better than the weights themselves.

Averages whose length grows with the run, and building one of any length from stored others.

The average of relative length σ_rel weighs the weights θ(τ) of time τ by a power of τ:

    θ̂(t) = ∫₀ᵗ p(τ) θ(τ) dτ,     p(τ) = (γ + 1) τ^γ / t^(γ+1)     (Karras et al. 2024, section 3.1)

σ_rel is the standard deviation of p as a share of t: 0.1 means that about the last tenth of the run
counts. After optimizer step k the average moves by

    θ̂ ← β_k θ̂ + (1 − β_k) θ_k,     β_k = (1 − 1/k)^(γ+1),     k = 1, 2, …       (eq. 127)

which is the integral above exactly when θ(τ) = θ_k for τ in (k − 1, k]: no approximation, and the
first random weights are forgotten at k = 1.

Because averages are linear in θ, a profile that is not stored can be fitted by stored ones, and the
same coefficients then combine the stored weights (their section 3.2).

Source: Karras et al. 2024, Analyzing and Improving the Training Dynamics of Diffusion Models,
arXiv:2312.02696.

They are tracked during training and stored now and then:

    OUTPUT/ema/step-00001000.safetensors      every average after 1000 optimizer steps, 16 bit
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.files import atomic_file
from latentdiff.train.distributed import local, release, whole
from latentdiff.weights import refuse_overflow, save_tensors


def decay_at(step: int, decay: float) -> float:
    """Decay after update number `step` (0, 1, …): min(decay, (1 + k)/(10 + k)).

    Without the warm-up the random first weights would stay in the average for 1/(1 − decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Keeps θ̄ ← d θ̄ + (1 − d) θ of a module's trainable parameters in float32.

    Of a sharded module every process averages its own rows; nothing is gathered.

    Args:
        module: the (unwrapped) module; its buffers are not averaged.
        decay: d in 0 … 1; 0 keeps a plain copy of the newest weights.
    Attributes: average: parameter name → its average, sharded as the parameter is.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self._module = decay, module
        self._live = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (counted from 0)."""
        average = [local(a) for a in self.average.values()]
        live = [local(p).float() for p in self._live.values()]
        torch._foreach_lerp_(average, live, 1 - self.decay_after(step))

    def decay_after(self, step: int) -> float:
        """The share of the old average that stays after optimizer step `step`."""
        return decay_at(step, self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module hold the averaged weights inside a `with` block."""
        kept = {n: local(p).clone() for n, p in self._live.items()}
        self._copy(self.average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            local(parameter).copy_(local(values[name]))
        release(self._module)


#: σ_rel at γ = 0, the plain mean of all steps; longer averages do not exist.
LONGEST = 1 / math.sqrt(12)
#: Weight of |coefficient|² in the fit, so that two profiles that are nearly one do no harm.
RIDGE = 1e-12


class Profile(NamedTuple):
    """One average: its exponent and the step at which it was taken."""

    gamma: float
    """γ ≥ 0."""
    step: int
    """t, optimizer steps made."""


def sigma_rel_of(gamma: float) -> float:
    """Relative length of the profile of exponent γ: its standard deviation over its end.

    σ_rel = (γ + 1)^½ (γ + 2)^−1 (γ + 3)^−½                                (eq. 123)
    """
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent γ ≥ 0 of a relative length, by bisection.

    Raises: UserError: a length outside 0 … 0.2887 (1/√12, the mean of all steps).
    """
    if not 0 < sigma_rel <= LONGEST:
        raise UserError(
            "an average's relative length (sigma_rel) must lie above 0 and at most at "
            f"{LONGEST:.4f}, which is the mean of all steps; got {sigma_rel}. "
            "0.05 to 0.15 are usual."
        )
    low, high = 0.0, 1 / sigma_rel  # σ_rel < 1/(γ + 2), so γ lies below 1/σ_rel
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def decay_of(gamma: float, step: int) -> float:
    """β_k = (1 − 1/k)^(γ+1), the share of the old average that stays at step k = 1, 2, …"""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """∫ p_i(τ) q_j(τ) dτ for two lists of profiles.

    With t the earlier end of the two and T the later, γ the exponent of the one that ends later:

        (γ_i + 1)(γ_j + 1) / (γ_i + γ_j + 1) · (t/T)^γ / T

    Returns: (len(first), len(second)) float64.
    """
    gamma_i, end_i = _columns(first)
    gamma_j, end_j = _columns(second)
    gamma_i, end_i = gamma_i[:, None], end_i[:, None]
    later = torch.maximum(end_i, end_j)
    of_later = torch.where(end_i < end_j, gamma_j, gamma_i)
    overlap = (torch.minimum(end_i, end_j) / later) ** of_later
    return (gamma_i + 1) * (gamma_j + 1) / (gamma_i + gamma_j + 1) * overlap / later


def fit(stored: Sequence[Profile], wanted: Profile) -> Tensor:
    """Coefficients c with Σ c_i p_i ≈ p in the least-squares sense, and Σ c_i = 1.

    The sum is imposed so that weights that never moved come out exactly. Solved from

        (G + λ I  1) (c)   (b)
        (1ᵀ       0) (μ) = (1),     G_ij = ∫ p_i p_j,   b_i = ∫ p_i p,   λ = RIDGE · max G

    Args:    stored: the profiles at hand, all with step ≥ 1; those after `wanted.step` do not help.
    Returns: (len(stored),) float64.
    """
    gram = inner_products(stored, stored)
    scale = gram.diagonal().max()
    count = len(stored)
    system = torch.ones(count + 1, count + 1, dtype=torch.float64)
    system[:count, :count] = gram / scale + RIDGE * torch.eye(count, dtype=torch.float64)
    system[count, count] = 0
    right = torch.ones(count + 1, 1, dtype=torch.float64)
    right[:count] = inner_products(stored, [wanted]) / scale
    return torch.linalg.solve(system, right)[:count, 0]


def misfit(stored: Sequence[Profile], coefficients: Tensor, wanted: Profile) -> float:
    """‖Σ c_i p_i − p‖ / ‖p‖ in L²: 0 is a perfect fit, above 0.1 the average is another one."""
    gram = inner_products(stored, stored)
    cross = inner_products(stored, [wanted])[:, 0]
    norm = inner_products([wanted], [wanted]).item()
    squared = coefficients @ gram @ coefficients - 2 * (coefficients @ cross) + norm
    return math.sqrt(max(float(squared), 0.0) / norm)


def _columns(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[p.gamma, p.step] for p in profiles], dtype=torch.float64)
    return rows[:, 0], rows[:, 1]


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
            f"{number}/{name}": whole(value).to("cpu", dtype).contiguous()
            for number, track in enumerate(self.tracks)
            for name, value in track.average.items()
        }
        refuse_overflow(tensors)
        if self._writes:
            about = {"step": step, "sigma_rel": [track.sigma_rel for track in self.tracks]}
            _write(self._folder / f"step-{step:08d}.safetensors", tensors, about)


def averages(ema: Ema, powers: PowerEmas) -> dict[str, Tensor]:
    """All averages of a run, to be checkpointed: those of lengths as `power-<n>/<parameter>`."""
    tracks = {f"power-{number}/": track for number, track in enumerate(powers.tracks)}
    return {p + n: t for p, one in ({"": ema} | tracks).items() for n, t in one.average.items()}


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


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as new:
        save_tensors(tensors, new, {"about": json.dumps(about)})
