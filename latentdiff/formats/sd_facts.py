"""What Stable Diffusion 1.x and 2.x are, and how one learns what a single file of them predicts.

Their configurations are files of the diffusers layout, so that a single file and a folder are read
alike. The numbers are those of the original YAML files:

    1.x       github.com/CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml
    2.x base  github.com/Stability-AI/stablediffusion, configs/stable-diffusion/v2-inference.yaml
    2.x v     the same, v2-inference-v.yaml

and the text towers' of the two models that these name: OpenAI's CLIP ViT-L/14, and OpenCLIP's
ViT-H/14, of whose 24 layers Stable Diffusion 2 uses all but the last ("penultimate").

Such a file, or a changed copy, may lie as MODEL.yaml beside MODEL.ckpt or MODEL.safetensors, where
AUTOMATIC1111 reads it too. Sizes are in the weights already and are compared with them. Taken are
the prediction, the noise schedule, the scale of the latents and their side.

Version 1 predicts eps as its published YAML does, unless the file, or the YAML beside it, says
otherwise. Version 2 was published both ways with the same keys and shapes. At the last noise level
x_T is all but pure noise ε, so a network that predicts eps gives back its input, and one that
predicts v = α ε − σ x_0 ≈ −x_0 gives something unlike it: their correlation decides.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError, choice_error, printable
from latentdiff.formats.scheduler import (
    ALPHA_TO_ONE,
    NUMBERS,
    SamplingDefaults,
    check_number,
    write_scheduler,
)
from latentdiff.models.clip_text import TextEncoder
from latentdiff.models.sizes import MOST_CHANNELS
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import UNetConfig, config_to_dict
from latentdiff.plain_yaml import parse_yaml
from latentdiff.tensor_file import TensorFile

#: Width of the text states → version.
VERSIONS = {768: "1", 1024: "2"}
_WIDTHS = [128, 256, 512, 512]
#: The text towers' configurations by version.
_TEXT = {
    "1": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768},
    "2": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
          "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512},
}  # fmt: skip
_TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}


def sd_configuration(
    version: str, prediction: str, *, zero_snr: bool = False, in_channels: int = 4
) -> dict[str, Any]:
    """The configuration files of a Stable Diffusion model, by the names of their folders.

    What the networks here take for a field that is left out is left out.

    Args:    version: 1 or 2.  prediction: eps, v, …: version 2 with v was trained on 768 pixels.
             zero_snr: trained on a schedule that ends in pure noise.
             in_channels: 9 for inpainting.
    """
    size = 96 if version == "2" and prediction == "v" else 64
    schedule = ScheduleConfig(zero_terminal_snr=zero_snr)
    sampling = SamplingDefaults(end_noisy=() if zero_snr else ALPHA_TO_ONE)
    return {
        "unet": config_to_dict(_unet(version, size, in_channels)),
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": _WIDTHS,
            "down_block_types": ["DownEncoderBlock2D"] * len(_WIDTHS),
            "layers_per_block": 2,
            "sample_size": size * 8,
            "up_block_types": ["UpDecoderBlock2D"] * len(_WIDTHS),
        },
        "text_encoder": _TEXT[version] | _TOKENS | {"attention_dropout": 0.0},
        "scheduler": write_scheduler(schedule, prediction, sampling),
        "tokenizer": {"clip": {"pad_token": "<|endoftext|>" if version == "1" else "!"}},
    }


def _unet(version: str, sample_size: int, in_channels: int) -> UNetConfig:
    first = UNetConfig(sample_size, in_channels, attention_head_dim=8, cross_attention_dim=768)
    if version == "1":
        return first
    # Scores of version 2 exceed float16, which its YAML (use_fp16 with xformers) does not say.
    return dataclasses.replace(
        first,
        attention_head_dim=(5, 10, 20, 20),  # num_head_channels: 64
        cross_attention_dim=1024,
        use_linear_projection=True,
        upcast_attention=True,
    )


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
_DEFAULT_SIZE = 64
_MOST_BYTES = 2**20


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
            if (stated := unet.get(name, own)) != own:
                raise UserError(
                    f"{self.path} is of another model: it says {name} {stated!r:.40}, and the "
                    f"weights beside it have {own}. Correct it or give it another name."
                )

    def overlay(self, config: dict[str, dict[str, Any]]) -> None:
        """Put it over configuration files by the names of their folders. Raises: UserError."""
        schedule = self.params.get("beta_schedule", "linear")
        if schedule not in list(_BETAS):
            raise choice_error(f"beta_schedule in {self.path}", schedule, _BETAS)
        config["scheduler"]["beta_schedule"] = _BETAS[schedule]
        for name in _SCHEDULE.keys() & self.params.keys():
            check_number(self.params[name], NUMBERS[_SCHEDULE[name]], f"{name} in {self.path}")
            config["scheduler"][_SCHEDULE[name]] = self.params[name]
        if "scale_factor" in self.params:
            scale = config["vae"]["scaling_factor"] = self.params["scale_factor"]
            check_number(scale, (1e-6, 1e6), f"scale_factor in {self.path}")
        if (size := self.params.get("image_size", _DEFAULT_SIZE)) != _DEFAULT_SIZE:
            check_number(size, (1, MOST_CHANNELS), f"image_size in {self.path}")
            config["unet"]["sample_size"] = size


def yaml_beside(file: Path) -> InferenceYaml | None:
    """The YAML file of a single file; None: there is none, or it is about something else (warned).

    Raises: UserError: it is no YAML, or cannot be read.
    """
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} has more than {_MOST_BYTES:,} bytes; no inference YAML has.")
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


#: Words for the prediction in the metadata → ours: ModelSpec's (github.com/Stability-AI/ModelSpec),
#: and those of diffusers and of trainers that stand in their place.
_WORDS = {"epsilon": "eps", "v": "v", "eps": "eps", "v_prediction": "v", "v_pred": "v",
          "sample": "x0", "x0": "x0"}  # fmt: skip
_ARCHITECTURES = {
    "stable-diffusion-v2-512": "eps",
    "stable-diffusion-v2-768-v": "v",
    "stable-diffusion-v2-inpainting": "eps",
}
#: Steps of the original trainings whose weights predict eps although they are of version 2.
#: Source: the .ckpt files' global_step, as in diffusers' loaders/single_file_utils.py.
_EPS_STEPS = (875_000,)
#: Empty tensors whose names say something: an agreement among trainers.
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"


def stated_prediction(file: TensorFile, beside: InferenceYaml | None = None) -> str | None:
    """What a file, or the YAML beside it, says its U-Net predicts; None: nothing.

    A YAML file that says it counts first, since it was put there for that; one that does not, and
    so means eps, counts last.
    """
    within = _metadata_prediction(file)
    if beside is None:
        return within
    if within not in (None, beside.prediction) and beside.says_prediction:
        warnings.warn(
            f"{beside.path} says that the model predicts {beside.prediction}, the file itself says "
            f"{within}; {beside.prediction} is taken.",
            stacklevel=2,
        )
    return beside.prediction if beside.says_prediction or within is None else within


def _metadata_prediction(file: TensorFile) -> str | None:
    given = file.metadata.get("modelspec.prediction_type", "")
    words = _WORDS.get(given.strip().lower().replace("-", "_"))
    if given and words is None:
        warnings.warn(
            f"{file.path} says '{printable(given[:40])}' for what it predicts "
            f"(modelspec.prediction_type), which is none of {', '.join(_WORDS)}; it is left out.",
            stacklevel=3,
        )
    words = words or _ARCHITECTURES.get(file.metadata.get("modelspec.architecture", ""))
    if words is None and V_KEY in file.tensors:
        return "v"
    if words is None and file.facts.get("global_step") in _EPS_STEPS:
        return "eps"
    return words


def has_zero_snr(file: TensorFile) -> bool:
    """Whether the schedule in the file, or its mark, ends in pure noise."""
    alpha_bar = file.tensors.get("alphas_cumprod")
    if alpha_bar is None or not alpha_bar.numel() or not alpha_bar.is_floating_point():
        return ZERO_SNR_KEY in file.tensors
    return ZERO_SNR_KEY in file.tensors or float(alpha_bar.flatten()[-1]) < 1e-5


@torch.no_grad()
def measured_prediction(unet: UNet, text_encoder: TextEncoder, size: int = 16) -> str:
    """eps or v, by whether the prediction for pure noise is that noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, size, size, generator=generator)
    context = text_encoder.encode([""])
    answer = unet(noise.to(unet.dtype), 999, context.to(unet.dtype)).float()
    noise = noise[:, : unet.config.out_channels]  # an inpainting model's latents come first
    correlation = torch.corrcoef(torch.stack([noise.flatten(), answer.flatten()]))[0, 1]
    return "eps" if float(correlation) > 0.5 else "v"
