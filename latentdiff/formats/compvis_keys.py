"""The key map between our parts and a single file in CompVis' layout, in both directions.

Computed from the configuration; every weight of ours is in exactly one key of the file. A key
may hold several of them, one below the other (OpenCLIP's queries, keys and values).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.compvis_text import text_keys
from latentdiff.formats.compvis_unet import unet_places
from latentdiff.formats.compvis_vae import is_attention, vae_places
from latentdiff.models.unet_config import UNetConfig

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
#: The averaged weights of a training, their names without dots.
EMA_PREFIX = "model_ema.diffusion_model"
PARTS = ("unet", "vae", "text_encoder")
State = Mapping[str, Tensor]
Keys = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Layout:
    """Which key of the file holds what."""

    unet: Keys
    """Key of the file → names in the U-Net whose rows it holds, in order."""
    vae: Keys
    """The same of the autoencoder."""
    text_encoder: Keys
    """The same of the text tower."""

    def all(self) -> Keys:
        """Every key of the file."""
        return self.unet | self.vae | self.text_encoder


def compvis_layout(
    unet: UNetConfig,
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    names: Mapping[str, Iterable[str]],
) -> Layout:
    """The layout of a model.

    Args:    unet, vae, text: the configurations of its parts.
             names: of the weights of each of `PARTS`.
    """
    unet_names, vae_names = unet_places(unet), vae_places(vae)
    return Layout(
        {UNET_PREFIX + placed(name, unet_names): (name,) for name in names["unet"]},
        {VAE_PREFIX + placed(name, vae_names): (name,) for name in names["vae"]},
        text_keys(names["text_encoder"], text),
    )


def take(tensors: State, keys: Keys, shapes: State) -> dict[str, Tensor]:
    """The tensors of one part under our names, as views of the file's.

    Args:    tensors: of the file; every one of `keys` is there.
             shapes: tensors of the shapes that the part has, for example on the meta device.
    """
    state = {}
    for key, names in keys.items():
        whole = tensors[key]
        pieces = whole.tensor_split(len(names)) if whole.ndim else (whole,) * len(names)
        for name, piece in zip(names, pieces, strict=True):
            state[name] = _squeeze(piece, shapes[name])
    return state


def give(state: State, keys: Keys, part: str) -> dict[str, Tensor]:
    """The tensors of one part under the keys of the file; the opposite of `take`."""
    tensors = {}
    for key, names in keys.items():
        pieces = [state[name] for name in names]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if part == "vae" and is_attention(names[0]):
            tensor = tensor[:, :, None, None]
        tensors[key] = tensor
    return tensors


def ema_key(key: str) -> str:
    """Where the averaged version of a U-Net's key is kept."""
    return EMA_PREFIX + key.removeprefix(UNET_PREFIX).replace(".", "")


def placed(name: str, places: Mapping[str, str]) -> str:
    """Rename the longest beginning of a dotted name that has a place elsewhere."""
    head, tail = name, ""
    while head:
        if head in places:
            return places[head] + tail
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return name


def _squeeze(tensor: Tensor, like: Tensor) -> Tensor:
    """A 1×1 convolution as the matrix that it is, or the other way round, where we have that."""
    same = {tensor.ndim, like.ndim} == {2, 4} and tensor.shape[:2] == like.shape[:2]
    return tensor.reshape(like.shape) if same and tensor.numel() == like.numel() else tensor
