"""MODEL.yaml beside MODEL.ckpt or MODEL.safetensors: what a single file cannot say itself.

Such files are the inference configurations of github.com/CompVis/stable-diffusion
(v1-inference.yaml) and github.com/Stability-AI/stablediffusion (v2-inference.yaml,
v2-inference-v.yaml), or changed copies; AUTOMATIC1111 reads them from the same place. Sizes are in
the weights already and are compared with them. Taken are the prediction, the noise schedule, the
scale of the latents and their side.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latentdiff.config_yaml import parse_yaml
from latentdiff.errors import UserError, choice_error

PARAMETERIZATIONS = ("eps", "v", "x0")
#: Their field → ours, in the scheduler's configuration.
_SCHEDULE = {
    "linear_start": "beta_start",
    "linear_end": "beta_end",
    "timesteps": "num_train_timesteps",
}
#: Their beta_schedule → diffusers'; "linear" is linear in √β.
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
#: Latents' side in every published file, those of models for 768 pixels too.
_UNTOLD_SIZE = 64
_LARGEST = 2**20


@dataclass(frozen=True)
class InferenceYaml:
    """What the file says."""

    path: Path
    """The file."""
    params: Mapping[str, Any]
    """Its section model.params."""

    @property
    def says_prediction(self) -> bool:
        """Whether the prediction is written; where it is not, it is eps."""
        return "parameterization" in self.params

    @property
    def prediction(self) -> str:
        """What the U-Net predicts. Raises: UserError: an unknown word."""
        word = self.params.get("parameterization", "eps")
        if word not in PARAMETERIZATIONS:
            raise choice_error(f"parameterization in {self.path}", word, PARAMETERIZATIONS)
        return str(word)

    def check(self, in_channels: int, context: int) -> None:
        """Refuse the file of another model. Raises: UserError."""
        unet = _section(self.params, "unet_config", "params")
        for name, own in (("in_channels", in_channels), ("context_dim", context)):
            if (said := unet.get(name, own)) != own:
                raise UserError(
                    f"{self.path} is of another model: it says {name} {said!r:.40}, and the "
                    f"weights beside it have {own}. Correct it or give it another name."
                )

    def overlay(self, config: dict[str, dict[str, Any]]) -> None:
        """Put it over configuration files by the names of their folders. Raises: UserError."""
        schedule = self.params.get("beta_schedule", "linear")
        if schedule not in list(_BETAS):
            raise choice_error(f"beta_schedule in {self.path}", schedule, _BETAS)
        config["scheduler"] |= {
            ours: self.params[name] for name, ours in _SCHEDULE.items() if name in self.params
        } | {"beta_schedule": _BETAS[schedule]}
        if "scale_factor" in self.params:
            config["vae"]["scaling_factor"] = self.params["scale_factor"]
        if (size := self.params.get("image_size", _UNTOLD_SIZE)) != _UNTOLD_SIZE:
            config["unet"]["sample_size"] = size


def yaml_beside(file: Path) -> InferenceYaml | None:
    """The YAML file of a single file; None: there is none, or it is about something else (warned).

    Raises: UserError: it is no YAML, or cannot be read.
    """
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST:,} bytes; no inference YAML has.")
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}, which is read for the model beside it, is not valid YAML: {error}. Correct "
            "it or give it another name."
        ) from error
    params = _section(data, "model", "params")
    if not {"parameterization", "unet_config"} & set(params):
        warnings.warn(
            f"{path} is left out: it is no inference configuration of {file.name}, which says "
            "parameterization or unet_config under model: params:",
            stacklevel=3,
        )
        return None
    return InferenceYaml(path, params)


def _section(data: Any, *names: str) -> dict[str, Any]:
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}
