"""scheduler_config.json against diffusers' own schedulers."""

from __future__ import annotations

import inspect
import json
from typing import Any

import diffusers
import pytest
import torch

from latentdiff.diffusion.samplers import sampler_name, timestep_grid
from latentdiff.diffusion.schedule import NoiseSchedule, ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.formats.scheduler import (
    ALPHA_TO_ONE,
    PREDICTION_NAMES,
    SamplingDefaults,
    read_scheduler,
    write_scheduler,
)

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
NAMES = [
    "PNDMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
]
SCHEDULES = [
    ScheduleConfig(),
    ScheduleConfig("linear", beta_start=1e-4, beta_end=0.02),
    ScheduleConfig("cosine"),
    ScheduleConfig(zero_terminal_snr=True),
    ScheduleConfig(num_train_timesteps=200),
]


def scheduler(name: str, **fields: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**fields)


def saved(scheduler: Any) -> dict[str, Any]:
    return {"_class_name": type(scheduler).__name__, **json.loads(scheduler.to_json_string())}


@pytest.mark.parametrize("name", NAMES)
def test_reads_the_facts_of_any_scheduler(name: str) -> None:
    theirs = scheduler(name, **SD, prediction_type="v_prediction", timestep_spacing="trailing")
    schedule, prediction, sampling = read_scheduler(saved(theirs))
    assert prediction == "v"
    assert sampling.spacing == "trailing"
    alpha_bar = NoiseSchedule(schedule).alpha_bar(torch.arange(1000))
    torch.testing.assert_close(alpha_bar.float(), theirs.alphas_cumprod.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_written_for_ddim_and_read_back(schedule: ScheduleConfig, prediction: str) -> None:
    if prediction == "eps" and schedule.zero_terminal_snr:
        pytest.skip("refused elsewhere")
    spacing = "trailing" if schedule.zero_terminal_snr else "leading"
    given = SamplingDefaults(spacing=spacing)
    data = write_scheduler(schedule, prediction, given)
    name = data["_class_name"]
    theirs = scheduler(name, **{k: v for k, v in data.items() if not k.startswith("_")})
    assert PREDICTION_NAMES[theirs.config.prediction_type] == prediction
    ours = NoiseSchedule(schedule)
    alpha_bar = ours.alpha_bar(torch.arange(schedule.num_train_timesteps)).float()
    torch.testing.assert_close(alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    theirs.set_timesteps(20)
    assert torch.equal(timestep_grid(ours, 20, spacing, 1), theirs.timesteps)
    assert saved(theirs).keys() - {"_diffusers_version"} == data.keys() - {"_diffusers_version"}
    back = read_scheduler(data)
    assert back == (read_scheduler(saved(theirs)))
    assert back == (schedule, prediction, given)


def test_flow_is_written_for_a_scheduler_that_the_pipeline_takes() -> None:
    data = write_scheduler(ScheduleConfig("flow"), "flow", SamplingDefaults())
    theirs = scheduler(
        data["_class_name"], **{k: v for k, v in data.items() if not k.startswith("_")}
    )
    theirs.set_timesteps(10)
    assert float(theirs.sigmas[0]) > 0.99 and hasattr(theirs, "init_noise_sigma")
    schedule, prediction, sampling = read_scheduler(saved(theirs))
    assert (schedule.kind, prediction, sampling.spacing) == ("flow", "flow", None)
    flow_match = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    assert read_scheduler(flow_match)[:2] == (ScheduleConfig("flow"), "flow")


def test_stable_diffusion_1_5_as_published() -> None:
    published = {
        "_class_name": "PNDMScheduler",
        **SD,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    found = read_scheduler(published)
    assert found == (
        ScheduleConfig(),
        "eps",
        SamplingDefaults("pndm", "leading", ("ddim", "pndm")),
    )


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("DPMSolverMultistepScheduler", {}, ("dpmpp_2m", "linspace", None)),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            ("dpmpp_2m_sde", "karras", None),
        ),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}, ("unipc", "linspace", 0)),
        ("EulerAncestralDiscreteScheduler", {}, ("euler_ancestral", "linspace", None)),
    ],
)
def test_solver_and_grid_are_those_of_the_folder(
    name: str, fields: dict[str, Any], expected: tuple[str, str, int | None]
) -> None:
    sampling = read_scheduler(saved(scheduler(name, **SD, **fields)))[2]
    found = sampling.sampler, sampling.spacing, sampling.final_timestep(sampling.sampler)
    assert found == expected


@pytest.mark.parametrize("name", [n for n in dir(diffusers) if n.endswith("Scheduler")])
def test_the_spacing_that_a_folder_leaves_out_is_its_scheduler_s_own(name: str) -> None:
    fields = inspect.signature(getattr(diffusers, name).__init__).parameters
    if "timestep_spacing" in fields:
        spacing = read_scheduler({"_class_name": name})[2].spacing
        assert spacing == fields["timestep_spacing"].default


def last_sigma(scheduler: Any) -> float:
    """σ/α that the last step of diffusers' scheduler leads to."""
    scheduler.set_timesteps(20)
    if hasattr(scheduler, "sigmas"):
        return float(scheduler.sigmas[-1])
    alpha_bar = getattr(scheduler, "final_alpha_cumprod", 1.0)  # DDPM has no such field
    return float((1 / alpha_bar - 1) ** 0.5)


@pytest.mark.parametrize("name", [*NAMES, "HeunDiscreteScheduler"])
@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "PNDMScheduler", "set_alpha_to_one": False},  # SD 1.x
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": False},  # SD 2.x
        {"_class_name": "DDIMScheduler", "set_alpha_to_one": True},
        {"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"},
        {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "zero"},
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "final_sigmas_type": "sigma_min",
            "set_alpha_to_one": False,
        },
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_every_sampler_ends_where_diffusers_ends_it_for_the_same_file(
    name: str, fields: dict[str, Any]
) -> None:
    import diffusers

    data = {**SD, **fields, "steps_offset": 1}
    if name == "PNDMScheduler":
        data["skip_prk_steps"] = True
        data.setdefault("set_alpha_to_one", True)  # its own default is another
    theirs = getattr(diffusers, name).from_config(data)
    schedule, _, sampling = read_scheduler(data)
    sampler = sampler_name(name)
    end = sampling.final_timestep(sampler)
    ours = NoiseSchedule(schedule)
    ratio = 0.0 if end is None else float(ours.noise_ratio(end))
    assert ratio == pytest.approx(last_sigma(theirs), rel=1e-4)


def test_the_last_level_survives_saving() -> None:
    for end_noisy in ((), ALPHA_TO_ONE):
        data = write_scheduler(ScheduleConfig(), "eps", SamplingDefaults(end_noisy=end_noisy))
        assert data["set_alpha_to_one"] is not bool(end_noisy)
        assert read_scheduler(data)[2].end_noisy == end_noisy


@pytest.mark.parametrize(
    ("fields", "prediction"),
    [
        ({}, "eps"),
        # As diffusers wrote it before prediction_type came (0.9).
        ({"predict_epsilon": True}, "eps"),
        ({"predict_epsilon": False}, "x0"),
        ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "v"),
    ],
)
def test_predictions_of_old_folders(fields: dict[str, Any], prediction: str) -> None:
    data = {k: v for k, v in SD.items() if k != "prediction_type"} | fields
    assert read_scheduler({"_class_name": "DDPMScheduler", **data})[1] == prediction


@pytest.mark.parametrize("kind", ["Euler", "Heun"])
def test_flow_matching_of_every_solver(kind: str) -> None:
    name = f"FlowMatch{kind}DiscreteScheduler"
    schedule, prediction, _ = read_scheduler({"_class_name": name, "shift": 1.0})
    assert (schedule.kind, prediction) == ("flow", "flow")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta_schedule": "scaled_liner"}, "Did you mean 'scaled_linear'"),
        ({"prediction_type": "velocity"}, "prediction_type must be one of"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"thresholding": True}, "thresholding"),
        ({"use_flow_sigmas": True, "flow_shift": 3.0}, "shifted by 3"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "shifted by 3"),
        ({"_class_name": "EDMEulerScheduler"}, "noise levels of EDMEulerScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "noise levels of ScoreSdeVeScheduler"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_scheduler({"_class_name": "DDIMScheduler", **SD, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"beta_start": "x"}, {"beta_end": 2}, {"beta_schedule": "v"}, {"prediction_type": "w"},
     {"prediction_type": 1}, {"thresholding": True}, {"use_flow_sigmas": True, "flow_shift": 3.0},
     {"_class_name": "EDMEulerScheduler"}],
    ids=str,
)  # fmt: skip
def test_what_is_refused_is_said_of_its_file(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^mine\.safetensors: "):
        read_scheduler({"_class_name": "DDIMScheduler", **SD, **fields}, "mine.safetensors")
