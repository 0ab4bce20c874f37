"""A whole model in one file, the way CompVis' code saves it: .safetensors or .ckpt, read.

    model.diffusion_model.…   the U-Net (and model_ema.…, its averaged weights)
    first_stage_model.…       the autoencoder
    cond_stage_model.…        the text tower

Such a file has no configuration. Ours carry it as JSON in their metadata; others are taken for
Stable Diffusion 1.x or 2.x when their shapes say so, and refused by name otherwise. A file opens
wholly or not at all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.formats.components import Components, check_inputs, empty_unet, fill_unet
from latentdiff.formats.compvis_keys import PARTS, Layout, compvis_layout, ema_key, take
from latentdiff.formats.compvis_text import CLIP_PREFIX, is_openclip, is_spare
from latentdiff.formats.generation_config import with_generation
from latentdiff.formats.identify import CONFIGURATION, Identity, identify, refuse_unsupported
from latentdiff.formats.inference_yaml import yaml_beside
from latentdiff.formats.scheduler_config import read_scheduler
from latentdiff.formats.sd_facts import sd_configuration
from latentdiff.formats.stated import has_zero_snr, measured_prediction, stated_prediction
from latentdiff.json_text import parse_json
from latentdiff.models.autoencoder import Autoencoder, empty_autoencoder, fill_autoencoder
from latentdiff.models.clip_vocabulary import tokenizer_of
from latentdiff.models.text_encoder import TextEncoder, empty_text_tower, fill_text_encoder
from latentdiff.models.unet_config import config_from_dict
from latentdiff.tensor_file import TensorFile, read_tensor_file
from latentdiff.weight_files import refuse_misfit, stored_dtype

#: How names of single files end.
ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
#: Keys that no part of a text-to-image model needs: buffers of the schedule, what training keeps
#: beside the weights, projections next to CLIP's image tower, marks.
_NEEDLESS = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|lvlb_weights|logvar|"
    r"scale_factor|posterior_(variance|log_variance_clipped|mean_coef[12])|v_pred|ztsnr|"
    r"model_ema\..*|first_stage_model\.loss\..*|"
    r"cond_stage_model\.transformer\.(text_model\.embeddings\.position_ids|text_projection\.weight)|"
    r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)|cond_stage_model\.logit_scale"
)


@dataclass(frozen=True)
class _Opened:
    """A file that is understood but not read yet."""

    file: TensorFile
    config: dict[str, Any]
    """Configuration files by the names of their folders."""
    is_measured: bool
    """Whether it could be either of Stable Diffusion 2's two kinds, and its weights must tell."""
    networks: dict[str, Any]
    """Part → network without weights."""
    layout: Layout
    others: list[str]
    """Keys that no part has a use for."""

    def state(self, part: str) -> dict[str, Tensor]:
        """The weights of one part, under our names."""
        return take(self.file.tensors, getattr(self.layout, part), _shapes(self.networks[part]))


def load_single_file(
    file: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
    prediction: str | None = None,
) -> Components:
    """Read a model from one file; nothing is downloaded.

    Args:    file: in CompVis' layout.
             dtype: of U-Net and text encoder in memory, see `load_components`.
             variant: non_ema for the newest weights where the file has averaged ones too.
             prediction: eps or v instead of what the file says or its weights tell.
    Raises:  UserError: damaged, another kind of model (named), or keys that are missing,
             unexpected or of another shape (listed).
    """
    found = read_tensor_file(Path(file).expanduser())
    return _assemble(_understand(found, variant, prediction), dtype, prediction)


def check_single_file(file: TensorFile) -> None:
    """Find out whether a file opens, without reading its weights. Raises: UserError: why not."""
    _assemble(dataclasses.replace(_understand(file), is_measured=False), None, None)


def autoencoder_of_file(file: Path) -> Autoencoder:
    """The autoencoder of a single file, in float32. Raises: UserError: see load_single_file."""
    return _autoencoder(_understand(read_tensor_file(file)), torch.float32)


def text_encoder_of_file(file: Path) -> TextEncoder:
    """The text encoder of a single file, in float32. Raises: UserError: see load_single_file."""
    return _text_encoder(_understand(read_tensor_file(file)), torch.float32)


def latent_size_of_file(file: Path) -> Any:
    """The side of the latents that a single file's U-Net was trained on.

    A version 2 that does not say what it predicts is read and asked, since its two kinds differ.
    """
    opened = _understand(read_tensor_file(file))
    config = opened.config
    if opened.is_measured:
        unet = fill_unet(opened.networks["unet"], opened.state("unet"), file, torch.float32)
        config = sd_configuration(
            "2", measured_prediction(unet, _text_encoder(opened, torch.float32))
        )
    return config["unet"].get("sample_size")


def _assemble(opened: _Opened, dtype: torch.dtype | None, prediction: str | None) -> Components:
    path, unet_state, config = opened.file.path, opened.state("unet"), opened.config
    unet = fill_unet(opened.networks["unet"], unet_state, path, dtype)
    text = _text_encoder(opened, dtype)
    if opened.is_measured:
        found = measured_prediction(unet, text)
        config = sd_configuration("2", found, zero_snr=has_zero_snr(opened.file) and found == "v")
        unet.config = config_from_dict(config["unet"])
        opened.networks["vae"].config["sample_size"] = config["vae"]["sample_size"]
    schedule, said, sampling = read_scheduler(config["scheduler"])
    tower = text.config_dict()
    kept = [key for key in opened.others if is_openclip(tower) and is_spare(key, tower)]
    components = Components(
        unet=unet,
        autoencoder=_autoencoder(opened, None if dtype is None else torch.float32),
        text_encoder=text,
        schedule=schedule,
        prediction=prediction or said,
        sampling=with_generation(sampling, config.get("generation", {}), path),
        dtype_on_disk=stored_dtype(unet_state),
        dropped=[key for key in opened.others if key not in kept],
        spare={key: opened.file.tensors[key] for key in kept},
    )
    components.check()
    return components


def _understand(
    found: TensorFile, variant: str | None = None, prediction: str | None = None
) -> _Opened:
    """Understand a file and compare its keys with those that it must have."""
    found, path = _with_usual_names(found), found.path
    shapes = {k: tuple(t.shape) for k, t in found.tensors.items()}
    identity = identify(shapes, found.metadata)
    refuse_unsupported(identity, path)
    config, is_measured = _configuration(found, identity, prediction)
    unet_config = config_from_dict(config["unet"])
    check_inputs(unet_config)
    networks: dict[str, Any] = {
        "unet": empty_unet(unet_config),
        "vae": empty_autoencoder(config["vae"], path),
        "text_encoder": empty_text_tower(config["text_encoder"], path),
    }
    names = {part: _shapes(networks[part]) for part in PARTS}
    layout = compvis_layout(unet_config, config["vae"], config["text_encoder"], names)
    layout = _averaged(layout, found, variant)
    others = _check_keys(found, layout, networks["text_encoder"].config)
    return _Opened(found, config, is_measured, networks, layout, others)


def _configuration(
    file: TensorFile, identity: Identity, prediction: str | None
) -> tuple[dict[str, Any], bool]:
    """Configuration files by the names of their folders; whether the weights must tell the rest."""
    if identity.version == "own":
        config = parse_json(file.metadata[CONFIGURATION], f"{file.path}'s configuration")
        try:
            parts = {part: dict(config[part]) for part in (*PARTS, "scheduler", "tokenizer")}
            return parts | {"generation": dict(config.get("generation") or {})}, False
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the configuration in {file.path}'s metadata is damaged: {error!r}."
            ) from error
    version, beside = str(identity.version), yaml_beside(file.path)
    stated = prediction or stated_prediction(file, beside)
    said = stated or ("eps" if version == "1" else "v")
    config = sd_configuration(version, said, zero_snr=has_zero_snr(file) and said == "v")
    if beside is not None:
        beside.check(config["unet"]["in_channels"], config["unet"]["cross_attention_dim"])
        beside.overlay(config)
    return config, version == "2" and stated is None


def _with_usual_names(file: TensorFile) -> TensorFile:
    """Put text_model into the names of files that some early trainers wrote without it."""
    plain = re.compile(re.escape(CLIP_PREFIX) + r"(?=embeddings\.|encoder\.|final_layer_norm\.)")
    named = {plain.sub(f"{CLIP_PREFIX}text_model.", k): t for k, t in file.tensors.items()}
    return TensorFile(file.path, named, file.metadata, file.facts)


def _averaged(layout: Layout, file: TensorFile, variant: str | None) -> Layout:
    """Take the averaged weights of a U-Net, when the file has all of them and they are wanted."""
    keys = {ema_key(key): names for key, names in layout.unet.items()}
    if variant not in (None, "ema", "non_ema"):
        raise UserError(f"variant must be ema or non_ema for a single file; got {variant!r}.")
    if variant != "non_ema" and all(key in file.tensors for key in keys):
        return Layout(keys, layout.vae, layout.text_encoder)
    if variant == "ema":
        raise UserError(f"{file.path} has no averaged weights (model_ema.…). Leave variant out.")
    return layout


def _check_keys(file: TensorFile, layout: Layout, text: Mapping[str, Any]) -> list[str]:
    """Compare the file's keys with the layout's. Returns: needless keys. Raises: UserError."""
    wanted = layout.all()
    others = [key for key in file.tensors if key not in wanted]
    averaged = any(key.startswith("model_ema.") for key in layout.unet)

    def needless(key: str) -> bool:
        newest = averaged and key.startswith("model.diffusion_model.")
        return newest or is_spare(key, text) or _NEEDLESS.fullmatch(key) is not None

    missing = [key for key in wanted if key not in file.tensors]
    refuse_misfit(missing, [key for key in others if not needless(key)], (), (), file.path)
    return others


def _autoencoder(opened: _Opened, dtype: torch.dtype | None) -> Autoencoder:
    return fill_autoencoder(opened.networks["vae"], opened.state("vae"), opened.file.path, dtype)


def _text_encoder(opened: _Opened, dtype: torch.dtype | None) -> TextEncoder:
    module, path = opened.networks["text_encoder"], opened.file.path
    positions = int(module.config["max_position_embeddings"])
    tokenizer = tokenizer_of(opened.config["tokenizer"], positions)
    return fill_text_encoder(module, opened.state("text_encoder"), tokenizer, path, dtype)


def _shapes(network: nn.Module) -> dict[str, Tensor]:
    """Names and, on the meta device, shapes of a network's weights."""
    return network.state_dict()
