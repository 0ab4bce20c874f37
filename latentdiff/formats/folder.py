"""The parts of a text-to-image model, and the Stable Diffusion folder of diffusers that holds them.

    model_index.json   unet/   vae/   text_encoder/   tokenizer/   scheduler/

What is written opens in diffusers.StableDiffusionPipeline.from_pretrained, and the other way
round; where the U-Net is given a masked image, in StableDiffusionInpaintPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import check_prediction
from latentdiff.diffusion.schedule import ScheduleConfig
from latentdiff.errors import UserError
from latentdiff.files import atomic_folder, read_json, whole_folder, write_json
from latentdiff.formats.hub import resolve_folder
from latentdiff.formats.scheduler import (
    SamplingDefaults,
    generation_defaults,
    read_scheduler,
    with_generation,
    write_scheduler,
)
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.clip_text import TextEncoder, load_text_encoder
from latentdiff.models.tokenizer import describe_tokenizer
from latentdiff.models.unet import UNet
from latentdiff.models.unet_config import DIFFUSERS_VERSION, UNetConfig, config_from_dict
from latentdiff.weights import (
    TEXT_STEM,
    UNET_STEM,
    VAE_STEM,
    load_weights,
    read_weights,
    stored_dtype,
    write_weights,
)

#: What a Stable Diffusion U-Net with that many input channels is given besides four of latents.
SPECIAL_INPUTS = {
    5: "a depth model (a depth map beside the latents)",
    7: "an upscaler (a small image beside the latents)",
    8: "an InstructPix2Pix model (the latents of an image to edit beside the noisy ones)",
}


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
    source: Path | None = None
    """The folder or file that they were read from."""
    dtype_on_disk: torch.dtype = torch.float32
    """What the U-Net was stored in; saving keeps to it unless told otherwise."""
    dropped: list[str] = field(default_factory=list)
    """Keys of the file or folder that no part has a use for."""
    spare: dict[str, Tensor] = field(default_factory=dict)
    """What OpenCLIP's tower has besides the layers in use, by its keys in a single file: of no use
    here, and kept for single files, since other programs look for it."""

    def __post_init__(self) -> None:
        """Raises: UserError: a clip_skip that this text encoder does not have."""
        text = self.text_encoder
        text.clip_skip = text.checked_skip(self.sampling.clip_skip or 0)

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises: UserError: latent channels, text width or prediction do not match.
        """
        unet, latent = self.unet.config, self.autoencoder.latent_channels
        check_inputs(unet, latent)
        for name, value in (("in_channels", unet.in_channels), ("out_channels", unet.out_channels)):
            if value != latent and not (name == "in_channels" and unet.inpaints):
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

    def part_dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """What each part is saved in: `dtype`, or what it was stored in."""
        vae, text = self.autoencoder.dtype_on_disk, self.text_encoder.dtype_on_disk
        return {
            "unet": dtype or self.dtype_on_disk,
            "vae": dtype or vae or self.dtype_on_disk,
            "text_encoder": dtype or text or self.dtype_on_disk,
        }


def check_inputs(unet: UNetConfig, latent_channels: int = 4) -> None:
    """Refuse by name a U-Net that is given what we have nothing for. Raises: UserError."""
    special = SPECIAL_INPUTS.get(unet.in_channels)
    if special and unet.out_channels == latent_channels == 4:
        raise UserError(
            f"this is {special}: its U-Net has {unet.in_channels} in_channels. Text-to-image "
            "models, with 4, and inpainting models, with 9, are supported."
        )


def empty_unet(config: UNetConfig) -> UNet:
    """Build a U-Net whose weights take no memory yet."""
    with torch.device("meta"):
        return UNet(config)


def fill_unet(
    unet: UNet, state: Mapping[str, Tensor], where: str | Path, dtype: torch.dtype | None
) -> UNet:
    """Put weights into an empty U-Net. Raises: UserError: they do not fit."""
    load_weights(unet, state, where, dtype)
    for parameter in unet.parameters():
        parameter.requires_grad_(True)
    unet.time_proj.requires_grad_(False)
    return unet.eval()


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
#: Optional, ours: what the pipeline takes when its caller gives nothing, see `SamplingDefaults`.
GENERATION = "generation_config.json"
LAYOUT = (*PARTS, "model_index.json", GENERATION, "safety_checker", "feature_extractor")
#: Shards of this size suit version control; a file's head comes on top.
SMALL_SHARDS = 15 * 2**20 - 2**16


#: Pipelines of diffusers for models of another kind, by how their names begin.
OTHER_MODELS = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionDepth": "a Stable Diffusion depth model",
    "StableDiffusionUpscale": "a Stable Diffusion upscaler",
    "StableDiffusionLatentUpscale": "a Stable Diffusion upscaler",
    "StableDiffusionInstructPix2Pix": "an InstructPix2Pix model",
    "StableUnCLIP": "Stable unCLIP",
    "StableVideo": "Stable Video Diffusion",
    "StableCascade": "Stable Cascade",
    "Flux": "FLUX",
    "PixArt": "PixArt",
    "Kandinsky": "Kandinsky",
    "LatentConsistency": "a latent consistency model",
    "AltDiffusion": "AltDiffusion",
}


def load_components(
    folder_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    autoencoder: Autoencoder | None = None,
) -> Components:
    """Read a model in the Stable Diffusion layout.

    Args:    folder_or_hub_id: a local folder, which never touches the network, or a hub id.
             dtype: of U-Net and text encoder in memory; the autoencoder is always float32,
             because Stable Diffusion's decoders overflow in float16. None: everything as it is on
             disk, for converting.
             revision: branch, tag or commit on the hub.
             variant: fp16, non_ema, …: the U-Net must have it, other parts take it if they do.
             autoencoder: instead of the folder's, which may have none.
    Raises:  UserError: a part is missing, unsupported, damaged or does not fit the others.
    """
    folder = resolve_folder(folder_or_hub_id, revision, variant)
    check_layout(folder, [part for part in PARTS if part != "vae" or autoencoder is None])
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule, prediction, sampling = read_scheduler(read_json(scheduler), scheduler)
    if (own := folder / GENERATION).is_file():
        sampling = with_generation(sampling, read_json(own), own)
    unet, on_disk = _read_unet(folder / "unet", dtype, variant)
    text = load_text_encoder(folder / "text_encoder", folder / "tokenizer", dtype, variant)
    vae_dtype = None if dtype is None else torch.float32
    components = Components(
        unet=unet,
        autoencoder=autoencoder or load_autoencoder(folder / "vae", vae_dtype, variant),
        text_encoder=text,
        schedule=schedule,
        prediction=prediction,
        sampling=sampling,
        source=folder,
        dtype_on_disk=on_disk,
        dropped=[f"text_encoder: {name}" for name in text.dropped],
    )
    components.check()
    return components


def save_components(
    folder: str | Path,
    components: Components,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a model in the Stable Diffusion layout, all at once.

    Args:    folder: new, empty, or a model folder, which is replaced only when all is written.
             dtype: on disk; None: what each part was read from.
             max_shard_bytes: split weights into files of this size, see `SMALL_SHARDS`.
    Returns: the folder.
    Raises:  UserError: parts that do not fit together, or a folder that cannot be written.
    """
    components.check()
    target = Path(folder).expanduser()
    config, dtypes = configuration(components), components.part_dtypes(dtype)
    states: dict[str, tuple[Mapping[str, Tensor], str]] = {
        "unet": (components.unet.state_dict(), UNET_STEM),
        "vae": (components.autoencoder.module.state_dict(), VAE_STEM),
        "text_encoder": (components.text_encoder.weights(), TEXT_STEM),
    }
    with atomic_folder(target, LAYOUT) as new:
        for part, (state, stem) in states.items():
            (new / part).mkdir()
            write_json(new / part / "config.json", config[part])
            write_weights(new / part, stem, state, dtypes[part], max_shard_bytes)
        components.text_encoder.tokenizer.save(new / "tokenizer")
        (new / "scheduler").mkdir()
        write_json(new / "scheduler" / "scheduler_config.json", config["scheduler"])
        write_json(new / "model_index.json", _model_index(config))
        if config["generation"]:
            write_json(new / GENERATION, config["generation"])
    return target


def configuration(components: Components) -> dict[str, dict[str, Any]]:
    """The model's configuration files, by the names of their folders."""
    sampling, text = components.sampling, components.text_encoder
    return {
        "unet": components.unet.config_dict(),
        "vae": components.autoencoder.config_dict(),
        "text_encoder": text.config_dict(),
        "scheduler": write_scheduler(components.schedule, components.prediction, sampling),
        "tokenizer": describe_tokenizer(text.tokenizer),
        "generation": generation_defaults(sampling),
    }


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Write an autoencoder's config.json and weights, in float16, all at once."""
    with whole_folder(folder) as new:
        write_json(new / "config.json", autoencoder.config_dict())
        write_weights(new, VAE_STEM, autoencoder.module.state_dict(), torch.float16)


def save_text_encoder(text: TextEncoder, folder: Path, max_shard_bytes: int) -> None:
    """Write a text encoder's config.json and weights, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", text.config_dict())
    write_weights(folder, TEXT_STEM, text.weights(), torch.float16, max_shard_bytes)


def _read_unet(
    folder: Path, dtype: torch.dtype | None, variant: str | None = None
) -> tuple[UNet, torch.dtype]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no U-Net at {folder}: config.json does not exist there.")
    config = config_from_dict(read_json(folder / "config.json"))
    check_inputs(config)
    state = read_weights(folder, UNET_STEM, variant, insist=True)
    return fill_unet(empty_unet(config), state, folder, dtype), stored_dtype(state)


def check_layout(folder: Path, parts: Sequence[str] = PARTS) -> None:
    """Refuse a folder of another kind of model, by name, or without a part. Raises: UserError."""
    index = folder / "model_index.json"
    kind = str(read_json(index).get("_class_name")) if index.is_file() else ""
    for start, name in OTHER_MODELS.items():
        if kind.startswith(start) and not kind.endswith("Legacy"):
            raise UserError(
                f"{folder} is {name} (diffusers' {kind}), which is not supported. Stable Diffusion "
                "1.x and 2.x for text to image and inpainting are."
            )
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} is not a Stable Diffusion folder: {', '.join(missing)} missing. "
            f"It must hold {', '.join(PARTS)}.{run_hint(folder)}"
        )


def run_hint(folder: Path) -> str:
    """Where the model is in the output folder of a training, which holds other files beside it.

    It is named and not opened: a run may hold several (model-sigma-…), or only a LoRA file.
    """
    if all((folder / "model" / name).is_dir() for name in PARTS):
        return f" Did you mean {folder / 'model'}?"
    models = sorted(index.parent.name for index in folder.glob("model*/model_index.json"))
    if models:
        return f" Did you mean {folder / models[0]}?"
    if (lora := folder / "lora").is_dir() or (folder / "learned_embeds.safetensors").is_file():
        option = f"--lora {lora}" if lora.is_dir() else f"--embedding {folder}"
        return f" It holds what a fine-tuning learned, to be given with {option}."
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        return (
            f" It is the output of a training that has not written its model yet: go on with "
            f"--resume output={folder}."
        )
    return ""


def _model_index(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    kind = "Inpaint" if config_from_dict(config["unet"]).inpaints else ""
    return {
        "_class_name": f"StableDiffusion{kind}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", config["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", config["vae"]["_class_name"]],
    }
