"""diffusers' scheduler_config.json ↔ our noise schedule, prediction and sampling defaults.

A scheduler in diffusers mixes what the model was trained with (schedule, prediction) and how to
sample from it (solver, grid). Any of its schedulers tells the first; of the second we keep the
solver where we have it, and the grid.

A model's own defaults of a call, kept in generation_config.json: optional, ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.diffusion.prediction import PREDICTIONS
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError, choice_error
from latentdiff.models.unet_config import DIFFUSERS_VERSION

#: diffusers' beta_schedule → ours.
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
#: diffusers' prediction_type → ours.
PREDICTION_NAMES = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
#: How the names of schedulers begin whose spacing is linspace where the file does not say it;
#: leading for all others.
_LINSPACE = ("DEIS", "DPMSolver", "Euler", "Heun", "KDPM2", "LMS", "SASolver", "UniPC")
#: Fields that are numbers, with the range that makes sense; others that are words.
NUMBERS = {"num_train_timesteps": (2, 10**6), "beta_start": (0, 1), "beta_end": (0, 1)}
_WORDS = ("_class_name", "prediction_type", "beta_schedule", "timestep_spacing")
#: Added to a leading grid; Stable Diffusion's readers insist on 1.
STEPS_OFFSET = 1
#: How the names of schedulers begin whose noise levels are no schedule of β.
_WITHOUT_BETAS = ("CMStochastic", "CosineDPM", "EDM", "KarrasVe", "ScoreSde", "VQDiffusion")
#: The samplers that each of diffusers' two fields for the last level concerns.
ALPHA_TO_ONE, FINAL_SIGMAS = (
    tuple(name for name, row in SAMPLERS.items() if row.last_level == field)
    for field in ("set_alpha_to_one", "final_sigmas_type")
)


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model's folder says to sample from it."""

    sampler: str = "ddim"
    """Name in SAMPLERS."""
    spacing: str | None = None
    """leading, trailing, linspace, karras, exponential; None: what suits the schedule."""
    end_noisy: tuple[str, ...] = ()
    """Names in SAMPLERS whose last step leads to the first noise level, not to the clean image."""
    guidance_scale: float | None = None
    """What this model is best guided with (generation_config.json); None: the usual scale."""
    chunk_tokens: int | None = None
    """Tokens of a prompt that one pass of the text encoder reads when a prompt is cut into chunks
    (generation_config.json); None: all that fit."""
    known_things: tuple[str, ...] = ()
    """Names of what the model was trained to draw (generation_config.json); a prompt that has none
    of them is warned of. Empty: any prompt is as good."""
    clip_skip: int | None = None
    """How many of the text encoder's last layers were left out in training
    (generation_config.json), see `TextEncoder.checked_skip`; None: none."""

    def final_timestep(self, sampler: str) -> int | None:
        """Where the last step of a sampler leads: None the clean image, 0 the first noise level."""
        return 0 if sampler in self.end_noisy else None


def read_scheduler(
    data: Mapping[str, Any], where: object = "scheduler_config.json"
) -> tuple[ScheduleConfig, str, SamplingDefaults]:
    """Understand a parsed scheduler_config.json.

    Args:    where: the file that it comes from, for messages.
    Returns: (noise schedule, prediction, sampling defaults).
    Raises:  UserError: a schedule or prediction that we do not have, named, or a damaged field.
    """
    for name in NUMBERS.keys() & data.keys():
        check_number(data[name], NUMBERS[name], f"{where}: {name}")
    for name in _WORDS:
        if not isinstance(data.get(name, ""), str):
            raise UserError(f"{where}: {name} must be text; got {data[name]!r:.80}.")
    kind = str(data.get("_class_name", "DDIMScheduler"))
    for field in ("trained_betas", "thresholding", "use_dynamic_shifting"):
        if data.get(field):
            raise UserError(f"{where}: {field}={data[field]!r} is not supported.")
    if kind.startswith(_WITHOUT_BETAS):
        raise UserError(
            f"{where}: the noise levels of {kind} are not supported; those of DDPM "
            "(a schedule of β) and of flow matching are."
        )
    flow = kind.startswith("FlowMatch") or bool(data.get("use_flow_sigmas"))
    # As diffusers wrote it before prediction_type came (0.9).
    usual = "sample" if data.get("predict_epsilon") is False else "epsilon"
    prediction_name = data.get("prediction_type", "flow_prediction" if flow else usual)
    if prediction_name not in PREDICTION_NAMES:
        raise choice_error(f"{where}: prediction_type", prediction_name, PREDICTION_NAMES)
    schedule = (_flow_schedule if flow else _discrete_schedule)(data, where)
    return schedule, PREDICTION_NAMES[prediction_name], _sampling(kind, data, schedule)


def write_scheduler(
    schedule: ScheduleConfig, prediction: str, sampling: SamplingDefaults
) -> dict[str, Any]:
    """The scheduler_config.json that makes diffusers sample as we do: DDIM, or UniPC for flow.

    Raises:  UserError: unknown prediction.
    """
    names = {ours: theirs for theirs, ours in PREDICTION_NAMES.items()}
    if prediction not in names:
        raise choice_error("prediction", prediction, PREDICTIONS)
    if schedule.kind == "flow":
        return _write_flow(schedule, names[prediction])
    kinds = {ours: theirs for theirs, ours in KINDS.items()}
    trailing = "trailing" if schedule.zero_terminal_snr else "leading"
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "beta_end": schedule.beta_end,
        "beta_schedule": kinds[schedule.kind],
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": names[prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "sample_max_value": 1.0,
        "set_alpha_to_one": sampling.final_timestep("ddim") is None,
        "steps_offset": STEPS_OFFSET,
        "thresholding": False,
        "timestep_spacing": sampling.spacing or trailing,
        "trained_betas": None,
    }


def _write_flow(schedule: ScheduleConfig, prediction_type: str) -> dict[str, Any]:
    # Stable Diffusion's pipeline cannot use diffusers' own flow schedulers; UniPC it can.
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": prediction_type,
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "solver_order": 2,
        "timestep_spacing": "linspace",
        "steps_offset": STEPS_OFFSET,
    }


def check_number(value: Any, range: tuple[float, float], what: str) -> None:
    """Refuse what is no number in a range.

    Args:   what: the field for the message, as its file calls it.
    Raises: UserError.
    """
    least, most = range
    if not (type(value) in (int, float) and least <= value <= most):
        raise UserError(f"{what} must be a number from {least} to {most:,}; got {value!r:.80}.")


def _discrete_schedule(data: Mapping[str, Any], where: object) -> ScheduleConfig:
    name = data.get("beta_schedule", "linear")
    if name not in KINDS:
        raise choice_error(f"{where}: beta_schedule", name, KINDS)
    return ScheduleConfig(
        kind=KINDS[name],  # type: ignore[arg-type]
        num_train_timesteps=int(data.get("num_train_timesteps", 1000)),
        beta_start=float(data.get("beta_start", 0.0001)),
        beta_end=float(data.get("beta_end", 0.02)),
        zero_terminal_snr=bool(data.get("rescale_betas_zero_snr", False)),
    )


def _flow_schedule(data: Mapping[str, Any], where: object) -> ScheduleConfig:
    shift = data.get("flow_shift", data.get("shift", 1.0))
    if shift != 1:
        raise UserError(
            f"{where}: a flow schedule shifted by {shift} is not supported; only a shift of 1 is."
        )
    return ScheduleConfig(
        kind="flow", num_train_timesteps=int(data.get("num_train_timesteps", 1000))
    )


def _sampling(kind: str, data: Mapping[str, Any], schedule: ScheduleConfig) -> SamplingDefaults:
    """The grid and solver of a file.

    As in diffusers' own pipeline for this layout, the offset is always 1 and samples are never
    clipped, whatever the file says: both are known mistakes of early folders.
    """
    found = (name for name, row in SAMPLERS.items() if kind in row.aliases)
    sampler = next(found, "ddim")
    if kind == "DPMSolverMultistepScheduler" and data.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    if schedule.kind == "flow":
        return SamplingDefaults(sampler)
    usual = "linspace" if kind.startswith(_LINSPACE) else "leading"
    spacing = data.get("timestep_spacing", usual)
    for name in ("karras", "exponential"):
        spacing = name if data.get(f"use_{name}_sigmas") else spacing
    to_one = data.get("set_alpha_to_one", kind != "PNDMScheduler")
    to_zero = data.get("final_sigmas_type", "zero") == "zero"
    end_noisy = () if to_one else ALPHA_TO_ONE
    return SamplingDefaults(sampler, spacing, end_noisy + (() if to_zero else FINAL_SIGMAS))


#: The smallest value of each whole number that the file may hold.
_LEAST = {"chunk_tokens": 1, "clip_skip": 0}


def generation_defaults(sampling: SamplingDefaults) -> dict[str, Any]:
    """What the file says; empty when there is nothing to say."""
    own = {name: getattr(sampling, name) for name in ("guidance_scale", *_LEAST)}
    own["known_things"] = list(sampling.known_things) or None
    return {key: value for key, value in own.items() if value is not None}


def with_generation(
    sampling: SamplingDefaults, data: Mapping[str, Any], where: object
) -> SamplingDefaults:
    """Take them over. Raises: UserError: a value outside its range."""
    scale = data.get("guidance_scale")
    counts: dict[str, Any] = {name: data.get(name) for name in _LEAST}
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale is not None and not (number and math.isfinite(scale) and scale >= 0):
        raise UserError(f"guidance_scale in {where} must be a number of at least 0; got {scale!r}.")
    for name, least in _LEAST.items():
        value = counts[name]
        if value is not None and (type(value) is not int or value < least):
            raise UserError(
                f"{name} in {where} must be a whole number of at least {least}; got {value!r:.80}."
            )
    things = data.get("known_things") or []
    if not isinstance(things, list) or not all(isinstance(t, str) and t.strip() for t in things):
        raise UserError(f"known_things in {where} must be a list of names; got {things!r:.80}.")
    scale = None if scale is None else float(scale)
    return dataclasses.replace(sampling, guidance_scale=scale, known_things=tuple(things), **counts)
