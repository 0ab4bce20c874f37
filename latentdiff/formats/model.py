"""A model by whatever name it has: a folder, a single file, a hub id."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from latentdiff.errors import UserError
from latentdiff.files import read_json
from latentdiff.formats.folder import Components, load_components, save_components
from latentdiff.formats.hub import resolve_folder
from latentdiff.formats.single_file import (
    ENDING,
    autoencoder_of_file,
    latent_size_of_file,
    load_single_file,
    save_single_file,
    text_encoder_of_file,
    vae_configuration,
)
from latentdiff.models.autoencoder import Autoencoder, load_autoencoder
from latentdiff.models.clip_text import TextEncoder, load_text_encoder
from latentdiff.tensor_file import ENDINGS


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    prediction: str | None = None,
    vae: str | Path | None = None,
) -> Components:
    """Open a model.

    Args:    name: a local folder or single file, which never touch the network, a hub id, or
             `embedded`, the model that comes with the package.
             dtype: of U-Net and text encoder in memory; the autoencoder is always float32. None:
             everything as it is on disk, for converting.
             revision: branch, tag or commit on the hub.
             variant: fp16, non_ema, … of a folder; non_ema of a single file.
             prediction: eps or v instead of what the model says.
             vae: an autoencoder instead of the model's own, which may have none: a folder or hub
             id of one or of a model, or a file in Stability's or diffusers' names. A file that
             does not say its configuration has that of the model's own.
    Raises:  UserError: missing, damaged, unsupported, or parts that do not fit each other.
    """
    file = as_file(name)
    folder = Path() if file else resolve_folder(name, revision, variant)
    autoencoder = None
    if vae is not None:
        autoencoder = open_autoencoder(vae, like=autoencoder_config(file or folder))
    if file:
        options = {"variant": variant, "prediction": prediction}
        return load_single_file(file, dtype=dtype, autoencoder=autoencoder, **options)
    components = load_components(folder, dtype=dtype, variant=variant, autoencoder=autoencoder)
    if prediction is not None:
        components = dataclasses.replace(components, prediction=prediction)
        components.check()
    return components


def save_model(
    path: str | Path,
    components: Components,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int | None = None,
) -> Path:
    """Write a folder, or a single file where the name ends in .safetensors."""
    if Path(path).suffix.lower() == ENDING:
        return save_single_file(path, components, dtype)
    return save_components(path, components, dtype, max_shard_bytes=max_shard_bytes)


def autoencoder_config(name: str | Path, revision: str | None = None) -> Any:
    """The configuration of a model's own autoencoder; None: it does not say it."""
    if file := as_file(name):
        return vae_configuration(file)
    own = resolve_folder(name, revision) / "vae" / "config.json"
    return read_json(own) if own.is_file() else None


def open_autoencoder(
    name: str | Path, revision: str | None = None, like: Any = None
) -> Autoencoder:
    """The autoencoder of a model, or of a folder or file that is one, in float32.

    Args:    like: its configuration, where it is a file that does not say it.
    Raises:  UserError: missing, or weights that do not fit.
    """
    if file := as_file(name):
        return autoencoder_of_file(file, like)
    folder = resolve_folder(name, revision)
    inner = folder / "vae"
    return load_autoencoder(inner if inner.is_dir() else folder)


def open_text_encoder(name: str | Path, revision: str | None = None) -> TextEncoder:
    """The text encoder of a model, in float32. Raises: UserError."""
    if file := as_file(name):
        return text_encoder_of_file(file)
    folder = resolve_folder(name, revision)
    return load_text_encoder(folder / "text_encoder", folder / "tokenizer")


def latent_size(name: str | Path, revision: str | None = None) -> Any:
    """(height, width) of the latents that a model was trained on; None: the file does not say."""
    if file := as_file(name):
        return latent_size_of_file(file)
    return read_json(resolve_folder(name, revision) / "unet" / "config.json").get("sample_size")


def as_file(name: str | Path) -> Path | None:
    """The single file of that name; None for folders and hub ids.

    Raises: UserError: named like a file, and not there.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix.lower() in ENDINGS and not path.is_dir():
        raise UserError(f"no model at {name}: this file does not exist.")
    return None
