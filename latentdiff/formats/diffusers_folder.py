"""The Stable Diffusion folder of diffusers, read and written.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/

What is written opens in diffusers.StableDiffusionPipeline.from_pretrained, and the other way
round.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import check_prediction
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.formats.atomic import atomic_folder
from latentdiff.formats.hub import resolve_folder
from latentdiff.formats.scheduler_config import (
    SamplingDefaults,
    read_scheduler,
    scheduler_class,
    write_scheduler,
)
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.text_encoder import TextEncoder, load_text_encoder
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import DIFFUSERS_VERSION
from latentdiff.weight_files import (
    KEEP_FLOAT32,
    TEXT_STEM,
    UNET_STEM,
    VAE_STEM,
    read_weights,
    stored_dtype,
    write_weights,
)

__all__ = ["Components", "load_components", "load_unet", "resolve_folder", "save_components"]

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
#: Optional, ours: what the pipeline takes when its caller gives nothing, see `SamplingDefaults`.
GENERATION = "generation_config.json"
LAYOUT = (*PARTS, "model_index.json", GENERATION, "safety_checker", "feature_extractor")
#: Shards of this size suit version control; a file's head comes on top.
SMALL_SHARDS = 15 * 2**20 - 2**16


@dataclass
class Components:
    """Everything that a text-to-image model consists of."""

    unet: UNet
    """The denoiser."""
    autoencoder: Autoencoder
    """Images ↔ latents."""
    text_encoder: TextEncoder
    """Prompts → context."""
    schedule: ScheduleConfig
    """The noise schedule of the training."""
    prediction: str
    """What the U-Net predicts: eps, x0, v or flow."""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How to sample when the caller does not say."""
    dtype_on_disk: torch.dtype = torch.float32
    """What the U-Net was stored in; `save_components` keeps to it unless told otherwise."""

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises: UserError: latent channels, text width or prediction do not match.
        """
        unet, latent = self.unet.config, self.autoencoder.latent_channels
        for name, value in (("in_channels", unet.in_channels), ("out_channels", unet.out_channels)):
            if value != latent:
                raise UserError(
                    f"the U-Net's {name} must equal the autoencoder's latent channels ({latent}); "
                    f"got {value}. They come from different models."
                )
        if unet.cross_attention_dim != self.text_encoder.width:
            raise UserError(
                f"the U-Net's cross_attention_dim must equal the text encoder's width "
                f"({self.text_encoder.width}); got {unet.cross_attention_dim}. "
                "They come from different models."
            )
        check_prediction(self.prediction, self.schedule)


def load_components(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Components:
    """Read a model in the Stable Diffusion layout.

    Args:    folder_or_hub_id: a local folder, which never touches the network, or a hub id.
             dtype: of U-Net and text encoder in memory; the autoencoder is always float32,
             because Stable Diffusion's decoders overflow in float16.
             revision: branch, tag or commit on the hub.
    Raises:  UserError: a part is missing, unsupported, damaged or does not fit the others.
    """
    folder = resolve_folder(folder_or_hub_id, revision)
    _check_layout(folder)
    schedule, prediction, sampling = read_scheduler(
        _read_json(folder / "scheduler" / "scheduler_config.json")
    )
    unet, on_disk = _read_unet(folder / "unet", dtype)
    components = Components(
        unet=unet,
        autoencoder=load_autoencoder(folder / "vae"),
        text_encoder=load_text_encoder(folder / "text_encoder", folder / "tokenizer", dtype),
        schedule=schedule,
        prediction=prediction,
        sampling=_with_generation(sampling, folder / GENERATION),
        dtype_on_disk=on_disk,
    )
    components.check()
    return components


def load_unet(folder: str | Path, dtype: torch.dtype = torch.float32) -> UNet:
    """Read a U-Net from a local folder with config.json and weights, for example `model/unet`.

    Raises:  UserError: missing, unsupported configuration, or weights that do not fit it.
    """
    return _read_unet(Path(folder), dtype)[0]


def save_components(
    folder: str | Path,
    components: Components,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a model in the Stable Diffusion layout, all at once.

    Args:    folder: new, empty, or a model folder, which is replaced only when all is written.
             dtype: on disk; None: what the model was read from.
             max_shard_bytes: split weights into files of this size, see `SMALL_SHARDS`.
    Returns: the folder.
    Raises:  UserError: parts that do not fit together, or a folder that cannot be written.
    """
    components.check()
    dtype = components.dtype_on_disk if dtype is None else dtype
    target = Path(folder).expanduser()
    vae, text = components.autoencoder, components.text_encoder
    parts: list[tuple[str, dict[str, Any], Mapping[str, Tensor], str]] = [
        ("unet", components.unet.config_dict(), components.unet.state_dict(), UNET_STEM),
        ("vae", vae.config_dict(), vae.module.state_dict(), VAE_STEM),
        ("text_encoder", text.config_dict(), text.weights(), TEXT_STEM),
    ]
    with atomic_folder(target, LAYOUT) as new:
        for name, config, state, stem in parts:
            (new / name).mkdir()
            _write_json(new / name / "config.json", config)
            write_weights(new / name, stem, state, dtype, max_shard_bytes)
        text.tokenizer.save(new / "tokenizer")
        (new / "scheduler").mkdir()
        scheduler = write_scheduler(components.schedule, components.prediction, components.sampling)
        _write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(new / "model_index.json", _model_index(components))
        own = {"guidance_scale": components.sampling.guidance_scale}
        own["chunk_tokens"] = components.sampling.chunk_tokens
        if own := {key: value for key, value in own.items() if value is not None}:
            _write_json(new / GENERATION, own)
    return target


def save_text_encoder(
    text: TextEncoder,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a text encoder's config.json and weights alone. Returns: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", text.config_dict())
    write_weights(folder, TEXT_STEM, text.weights(), dtype, max_shard_bytes)
    return folder


def _with_generation(sampling: SamplingDefaults, file: Path) -> SamplingDefaults:
    """Take the model's own guidance scale and chunks from a file that need not be there."""
    data = _read_json(file) if file.is_file() else {}
    scale, chunk = data.get("guidance_scale"), data.get("chunk_tokens")
    number = isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0
    if scale is not None and not number:
        raise UserError(f"guidance_scale in {file} must be a number of at least 0; got {scale!r}.")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise UserError(
            f"chunk_tokens in {file} must be a whole number of at least 1; got {chunk!r}."
        )
    return dataclasses.replace(
        sampling,
        guidance_scale=None if scale is None else float(scale),
        chunk_tokens=chunk,
    )


def _read_unet(folder: Path, dtype: torch.dtype) -> tuple[UNet, torch.dtype]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no U-Net at {folder}: config.json does not exist there.")
    config, state = _read_json(folder / "config.json"), read_weights(folder, UNET_STEM)
    on_disk = stored_dtype(state)
    # On the meta device nothing is allocated or initialised; the file's tensors are put in place.
    with torch.device("meta"):
        unet = UNet.from_config(config)
    state = {
        name: tensor if name.endswith(KEEP_FLOAT32) else tensor.to(dtype)
        for name, tensor in state.items()
    }
    try:
        unet.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(_misfit(folder, error)) from error
    for parameter in unet.parameters():
        parameter.requires_grad_(True)
    unet.time_proj.requires_grad_(False)
    return unet.eval(), on_disk


def _misfit(folder: Path, error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines()[1:4]]
    return f"the weights in {folder} do not fit its config.json: {' '.join(lines)[:400]}"


def _check_layout(folder: Path) -> None:
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} is not a Stable Diffusion folder: {', '.join(missing)} missing. "
            f"It must hold {', '.join(PARTS)}."
        )


def _model_index(components: Components) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class(components.schedule)],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", components.autoencoder.kind],
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or not valid JSON: {error}") from error


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
