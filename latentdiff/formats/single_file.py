"""A whole model in one file, the way CompVis' code saves it: .safetensors or .ckpt.

    model.diffusion_model.…   the U-Net (and model_ema.…, its averaged weights)
    first_stage_model.…       the autoencoder
    cond_stage_model.…        the text tower

Such a file has no configuration. Ours carry it as JSON in their metadata; others are taken for
Stable Diffusion 1.x or 2.x when their shapes say so, and refused by name otherwise. A file opens
wholly or not at all. Programs that open single files by their keys alone (A1111, ComfyUI) take
every size from what Stable Diffusion is, so one part of another size makes a file unreadable there.

Written files, .safetensors alone, have ModelSpec's fields in their metadata, which other programs
show and some read, beside the configuration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.files import parse_json, written_file
from latentdiff.formats.folder import (
    Components,
    check_inputs,
    configuration,
    empty_unet,
    fill_unet,
)
from latentdiff.formats.identify import (
    CONFIGURATION,
    Identity,
    Shapes,
    identify,
    input_channels,
    refuse_unsupported,
)
from latentdiff.formats.key_map import (
    CLIP_PREFIX,
    PARTS,
    UNET_PREFIX,
    VAE_PREFIX,
    Keys,
    compvis_layout,
    ema_key,
    from_compvis,
    from_compvis_vae,
    is_openclip,
    is_spare,
    to_compvis,
)
from latentdiff.formats.scheduler import read_scheduler, with_generation
from latentdiff.formats.sd_facts import (
    VERSIONS,
    has_zero_snr,
    measured_prediction,
    sd_configuration,
    stated_prediction,
    yaml_beside,
)
from latentdiff.models import clip_text, vae
from latentdiff.models.autoencoder import Autoencoder, empty_autoencoder, fill_autoencoder
from latentdiff.models.clip_text import TextEncoder, empty_text_tower, fill_text_encoder
from latentdiff.models.tokenizer import CLIP, tokenizer_of
from latentdiff.models.unet_config import config_from_dict, per_level
from latentdiff.tensor_file import TensorFile, read_tensor_file
from latentdiff.weights import refuse_misfit, save_tensors, stored_dtype, stored_tensor

ENDING = ".safetensors"
#: Keys that no part of a text-to-image model needs: buffers of the schedule, what training keeps
#: beside the weights, projections next to CLIP's image tower, marks.
_UNUSED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|lvlb_weights|logvar|"
    r"scale_factor|posterior_(variance|log_variance_clipped|mean_coef[12])|v_pred|ztsnr|"
    r"model_ema\..*|first_stage_model\.loss\..*|"
    r"cond_stage_model\.transformer\.(text_model\.embeddings\.position_ids|text_projection\.weight)|"
    r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)|cond_stage_model\.logit_scale"
)

#: The same beside the weights of an autoencoder alone.
_UNUSED_VAE = re.compile(r"loss\.|model_ema\.")


@dataclass(frozen=True)
class _Parsed:
    """A file that is understood but not read yet."""

    file: TensorFile
    config: dict[str, Any]
    """Configuration files by the names of their folders."""
    is_measured: bool
    """Whether it could be either of Stable Diffusion 2's two kinds, and its weights must tell."""
    networks: dict[str, Any]
    """Part → network without weights."""
    layout: dict[str, Keys]
    others: list[str]
    """Keys that no part has a use for."""

    def state(self, part: str) -> dict[str, Tensor]:
        """The weights of one part, under our names."""
        return from_compvis(self.file.tensors, self.layout[part], self.networks[part].state_dict())

    def autoencoder(self, dtype: torch.dtype | None) -> Autoencoder:
        """The autoencoder. Raises: UserError: its weights do not fit."""
        return fill_autoencoder(self.networks["vae"], self.state("vae"), self.file.path, dtype)

    def text_encoder(self, dtype: torch.dtype | None) -> TextEncoder:
        """The text encoder. Raises: UserError: its weights or its tokenizer do not fit."""
        module, state = self.networks["text_encoder"], self.state("text_encoder")
        positions = int(module.config["max_position_embeddings"])
        tokenizer = tokenizer_of(self.config["tokenizer"], positions)
        return fill_text_encoder(module, state, tokenizer, self.file.path, dtype)


def load_single_file(
    file: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    variant: str | None = None,
    prediction: str | None = None,
    autoencoder: Autoencoder | None = None,
) -> Components:
    """Read a model from one file; nothing is downloaded.

    Args:    file: in CompVis' layout.
             dtype: of U-Net and text encoder in memory, see `load_components`.
             variant: non_ema for the newest weights where the file has averaged ones too.
             prediction: eps or v instead of what the file says or its weights tell.
             autoencoder: instead of the file's, which may have none.
    Raises:  UserError: damaged, another kind of model (named), or keys that are missing,
             unexpected or of another shape (listed).
    """
    found = read_tensor_file(Path(file).expanduser())
    opened = _parse(found, variant, prediction, with_vae=autoencoder is None)
    return _assemble(opened, dtype, prediction, autoencoder)


def check_single_file(file: TensorFile) -> None:
    """Find out whether a file opens, without reading its weights. Raises: UserError: why not."""
    _assemble(dataclasses.replace(_parse(file), is_measured=False), None, None)


def autoencoder_of_file(file: Path, like: Mapping[str, Any] | None = None) -> Autoencoder:
    """The autoencoder of a single file, or of one that holds nothing else, in float32.

    Args:    like: its configuration where the file does not say it; None: Stable Diffusion's.
    Raises:  UserError: see load_single_file; weights that do not fit the configuration.
    """
    found = read_tensor_file(file)
    whole = any(key.startswith(UNET_PREFIX) for key in found.tensors)
    if whole or CONFIGURATION in found.metadata:
        return _parse(found).autoencoder(torch.float32)
    config = sd_configuration("1", "eps")["vae"] if like is None else like
    network, levels = empty_autoencoder(config, file), len(config["block_out_channels"])
    tensors = {key: t for key, t in found.tensors.items() if not _UNUSED_VAE.match(key)}
    state = from_compvis_vae(tensors, network.state_dict(), levels)
    return fill_autoencoder(network, state, file, torch.float32)


def vae_configuration(file: Path) -> Mapping[str, Any] | None:
    """The autoencoder's configuration that a single file has; None: Stable Diffusion's."""
    metadata = read_tensor_file(file).metadata
    if CONFIGURATION not in metadata:
        return None
    return dict(parse_json(metadata[CONFIGURATION], f"{file}'s configuration")["vae"])


def text_encoder_of_file(file: Path) -> TextEncoder:
    """The text encoder of a single file, in float32. Raises: UserError: see load_single_file."""
    return _parse(read_tensor_file(file)).text_encoder(torch.float32)


def latent_size_of_file(file: Path) -> Any:
    """The side of the latents that a single file's U-Net was trained on.

    A version 2 that does not say what it predicts is read and asked, since its two kinds differ.
    """
    opened = _parse(read_tensor_file(file), with_vae=False)
    config = opened.config
    if opened.is_measured:
        unet = fill_unet(opened.networks["unet"], opened.state("unet"), file, torch.float32)
        measured = measured_prediction(unet, opened.text_encoder(torch.float32))
        config = sd_configuration("2", measured)
    return config["unet"].get("sample_size")


def _assemble(
    opened: _Parsed,
    dtype: torch.dtype | None,
    prediction: str | None,
    autoencoder: Autoencoder | None = None,
) -> Components:
    path, unet_state, config = opened.file.path, opened.state("unet"), opened.config
    unet = fill_unet(opened.networks["unet"], unet_state, path, dtype)
    text = opened.text_encoder(dtype)
    if opened.is_measured:
        found = measured_prediction(unet, text)
        zero_snr, channels = has_zero_snr(opened.file) and found == "v", unet.config.in_channels
        config = sd_configuration("2", found, zero_snr=zero_snr, in_channels=channels)
        unet.config = config_from_dict(config["unet"])
        if autoencoder is None:
            opened.networks["vae"].config["sample_size"] = config["vae"]["sample_size"]
    schedule, said, sampling = read_scheduler(config["scheduler"], path)
    tower = text.config_dict()
    kept = [key for key in opened.others if is_openclip(tower) and is_spare(key, tower)]
    components = Components(
        unet=unet,
        autoencoder=autoencoder or opened.autoencoder(None if dtype is None else torch.float32),
        text_encoder=text,
        schedule=schedule,
        prediction=prediction or said,
        sampling=with_generation(sampling, config.get("generation", {}), path),
        source=path,
        dtype_on_disk=stored_dtype(unet_state),
        dropped=[key for key in opened.others if key not in kept],
        spare={key: opened.file.tensors[key] for key in kept},
    )
    components.check()
    return components


def _parse(
    found: TensorFile,
    variant: str | None = None,
    prediction: str | None = None,
    *,
    with_vae: bool = True,
) -> _Parsed:
    """Understand a file and compare its keys with those that it must have.

    Args: with_vae: False: it need not have an autoencoder, and what it has of one is left out.
    """
    found, path = _normalized_names(found), found.path
    shapes = {k: tuple(t.shape) for k, t in found.tensors.items()}
    if not with_vae:
        shapes[VAE_PREFIX] = ()  # stands for what comes from elsewhere
        rest = {k: t for k, t in found.tensors.items() if not k.startswith(VAE_PREFIX)}
        found = dataclasses.replace(found, tensors=rest)
    identity = identify(shapes, found.metadata)
    refuse_unsupported(identity, path)
    config, is_measured = _configuration(found, identity, prediction, shapes)
    unet_config = config_from_dict(config["unet"])
    check_inputs(unet_config)
    networks: dict[str, Any] = {
        "unet": empty_unet(unet_config),
        "text_encoder": empty_text_tower(config["text_encoder"], path),
    }
    if with_vae:
        networks["vae"] = empty_autoencoder(config["vae"], path)
    names = {part: networks[part].state_dict() if part in networks else {} for part in PARTS}
    layout = compvis_layout(unet_config, config["vae"], config["text_encoder"], names)
    layout = _with_ema(layout, found, variant)
    others = _check_keys(found, layout, networks["text_encoder"].config)
    return _Parsed(found, config, is_measured, networks, layout, others)


def _configuration(
    file: TensorFile, identity: Identity, prediction: str | None, shapes: Shapes
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
    zero_snr, channels = has_zero_snr(file) and said == "v", input_channels(shapes)
    config = sd_configuration(version, said, zero_snr=zero_snr, in_channels=channels)
    if beside is not None:
        beside.check(config["unet"]["in_channels"], config["unet"]["cross_attention_dim"])
        beside.overlay(config)
    return config, version == "2" and stated is None


def _normalized_names(file: TensorFile) -> TensorFile:
    """Put text_model into the names of files that some early trainers wrote without it."""
    plain = re.compile(re.escape(CLIP_PREFIX) + r"(?=embeddings\.|encoder\.|final_layer_norm\.)")
    named = {plain.sub(f"{CLIP_PREFIX}text_model.", k): t for k, t in file.tensors.items()}
    return TensorFile(file.path, named, file.metadata, file.facts)


def _with_ema(layout: dict[str, Keys], file: TensorFile, variant: str | None) -> dict[str, Keys]:
    """Take the averaged weights of a U-Net, when the file has all of them and they are wanted."""
    keys = {ema_key(key): names for key, names in layout["unet"].items()}
    if variant not in (None, "ema", "non_ema"):
        raise UserError(f"variant must be ema or non_ema for a single file; got {variant!r}.")
    if variant != "non_ema" and all(key in file.tensors for key in keys):
        return layout | {"unet": keys}
    if variant == "ema":
        raise UserError(f"{file.path} has no averaged weights (model_ema.…). Leave variant out.")
    return layout


def _check_keys(file: TensorFile, layout: dict[str, Keys], text: Mapping[str, Any]) -> list[str]:
    """Compare the file's keys with the layout's. Returns: unused keys. Raises: UserError."""
    wanted = {key for keys in layout.values() for key in keys}
    others = [key for key in file.tensors if key not in wanted]
    averaged = any(key.startswith("model_ema.") for key in layout["unet"])

    def unused(key: str) -> bool:
        newest = averaged and key.startswith("model.diffusion_model.")
        return newest or is_spare(key, text) or _UNUSED.fullmatch(key) is not None

    missing = [key for key in wanted if key not in file.tensors]
    unexpected = [key for key in others if not unused(key)]
    refuse_misfit(file.path, {"missing": missing, "unexpected": unexpected})
    return others


#: Stands in the header while the tensors are written; their hash has as many characters.
_NO_HASH = "0x" + "0" * 64
_CODE = {
    "1": "https://github.com/CompVis/stable-diffusion",
    "2": "https://github.com/Stability-AI/stablediffusion",
}


def save_single_file(
    file: str | Path,
    components: Components,
    dtype: torch.dtype | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Write a model into one file, all at once; an older file of that name is replaced.

    Args:    file: its name must end in .safetensors.
             dtype: on disk; None: what each part was read from.
             title: for programs that show one; None: the file's name.
    Returns: the file.
    Raises:  UserError: another ending, a folder of that name, or it cannot be written.
    """
    components.check()
    target = Path(file).expanduser().absolute()
    check_target(target)
    config, dtypes = configuration(components), components.part_dtypes(dtype)
    vae, text = components.autoencoder.module, components.text_encoder.module
    networks = {"unet": components.unet, "vae": vae, "text_encoder": text}
    states = {part: network.state_dict() for part, network in networks.items()}
    unet = components.unet.config
    layout = compvis_layout(unet, config["vae"], config["text_encoder"], states)
    tensors: dict[str, Tensor] = {}
    for part, state in states.items():
        stored = {name: stored_tensor(name, t, dtypes[part]) for name, t in state.items()}
        tensors |= to_compvis(stored, layout[part], part)
    if is_openclip(config["text_encoder"]):
        kind = dtypes["text_encoder"]
        tensors |= {name: stored_tensor(name, t, kind) for name, t in components.spare.items()}
    metadata = modelspec(components, title or target.stem)
    metadata[CONFIGURATION] = json.dumps(config, ensure_ascii=False)
    with written_file(target) as new:
        save_tensors(tensors, new, metadata)
        _put_hash(new)
    return target


def check_target(target: Path) -> None:
    """Refuse a name that a file cannot have. Raises: UserError."""
    if target.suffix.lower() != ENDING:
        raise UserError(
            f"a single file is written as {ENDING}; got {target.name}. Pickles are only read."
        )
    if target.is_dir():
        raise UserError(f"cannot write a file to {target}: it is a folder.")


def modelspec(components: Components, title: str) -> dict[str, str]:
    """Metadata after github.com/Stability-AI/ModelSpec, version 1.0.0."""
    version, prediction = sd_version(components), components.prediction
    size = components.unet.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    scale = components.autoencoder.downscale
    names = {"1": "stable-diffusion-v1", "2": "stable-diffusion-v2-512"}
    if components.unet.config.inpaints:
        names = {v: f"stable-diffusion-v{v}-inpainting" for v in names}
    elif (version, prediction) == ("2", "v"):
        names["2"] = "stable-diffusion-v2-768-v"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": names.get(version or "", "latentdiff"),
        "modelspec.implementation": _CODE.get(version or "", "latentdiff"),
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{width * scale}x{height * scale}",
        "modelspec.prediction_type": "epsilon" if prediction == "eps" else prediction,
        "modelspec.hash_sha256": _NO_HASH,
    }


def _put_hash(file: Path) -> None:
    """Fill in the hash of everything behind the header, which ModelSpec has in the header."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
        digest = hashlib.sha256()
        while chunk := opened.read(2**24):
            digest.update(chunk)
        opened.seek(8 + header.index(_NO_HASH.encode()))
        opened.write(f"0x{digest.hexdigest()}".encode())


#: What no weight depends on, and heads, which can be written in two ways and are compared apart.
_FREE = {"sample_size", "upcast_attention", "dropout", "attention_head_dim"}
#: Settings that may be one number for all levels.
_PER_LEVEL = ("layers_per_block", "transformer_layers_per_block")


def sd_version(components: Components) -> str | None:
    """1 or 2 when every part is Stable Diffusion's, which other programs can open; else None."""
    return None if sd_differences(components) else VERSIONS[_context(components)]


def sd_differences(components: Components) -> dict[str, list[str]]:
    """What is not as in Stable Diffusion, by part; empty when all is.

    The version to compare with is the one whose text states are as wide, 1.x where none is.
    """
    channels = components.unet.config.in_channels if components.unet.config.inpaints else 4
    sd = sd_configuration(VERSIONS.get(_context(components), "1"), "eps", in_channels=channels)
    own = configuration(components)
    facts = {"U-Net": _unet_facts, "autoencoder": _vae_facts, "text encoder": _text_facts}
    found = {
        name: _differing(facts_of(own[part]), facts_of(sd[part]))
        for (name, facts_of), part in zip(facts.items(), PARTS, strict=True)
    }
    if not found["text encoder"] and CLIP not in own["tokenizer"]:
        found["tokenizer"] = ["another vocabulary than CLIP's"]
    return {name: texts for name, texts in found.items() if texts}


def _context(components: Components) -> int:
    return components.unet.config.cross_attention_dim


def _differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {own[name]} instead of {value}"
        for name, value in other.items()
        if own[name] != value
    ]


def _unet_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    unet = config_from_dict(config)
    facts = {name: value for name, value in vars(unet).items() if name not in _FREE}
    # A number may also be written once for every level.
    levels = len(unet.block_out_channels)
    facts |= {name: per_level(facts[name], levels) for name in _PER_LEVEL} | {"heads": unet.heads}
    return {name: _plain(value) for name, value in facts.items()}


def _vae_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    # Those programs multiply by Stable Diffusion's factor and shift nothing.
    usual = {"_class_name": "AutoencoderKL", **vae.DEFAULTS, "shift_factor": 0.0}
    facts = _with_defaults(config, usual)
    return facts | {"shift_factor": facts["shift_factor"] or 0.0}


def _text_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return _with_defaults(config, clip_text.DEFAULTS)


def _with_defaults(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(config.get(name, value)) for name, value in usual.items()}


def _plain(value: Any) -> Any:
    """Lists of JSON and tuples of ours alike."""
    return list(value) if isinstance(value, tuple) else value
