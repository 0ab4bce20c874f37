"""The key map between our parts and a single file in CompVis' layout, in both directions.

Computed from the configuration; every weight of ours is in exactly one key of the file. A key
may hold several of them, one below the other (OpenCLIP's queries, keys and values).

U-Net: CompVis' code, which names the keys of single files, differs in its structure. The way down
and the way up are two flat rows, `input_blocks` and `output_blocks`, counted through all
resolutions: conv_in is input block 0, then every ResNet block with its transformer is one, then
every halving. A doubling is the last entry of the output block before it.

Source: Rombach et al.'s code, github.com/CompVis/stable-diffusion,
ldm/modules/diffusionmodules/openaimodel.py.

Autoencoder: the decoder's resolutions count from the finest there, from the coarsest here.

Source: github.com/CompVis/stable-diffusion, ldm/modules/diffusionmodules/model.py.

Text tower, two layouts after two CLIPs: Stable Diffusion 1.x keeps transformers' CLIPTextModel,
name by name. 2.x keeps OpenCLIP's tower: other names, and queries, keys and values of a layer below
each other in one matrix. OpenCLIP's is written for towers with its exact GELU, the other one for
OpenAI's approximation of it.

Sources: github.com/Stability-AI/stablediffusion, ldm/modules/encoders/modules.py;
github.com/openai/CLIP, clip/model.py, whose names OpenCLIP has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.unet_config import UNetConfig, per_level
from latentdiff.models.vae import DEFAULTS

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


#: Layers of a ResNet block: ours → theirs.
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_places(config: UNetConfig) -> dict[str, str]:
    """Module of ours → module of theirs; below a transformer the names are the same.

    Random Fourier features, which they do not have, keep their name.
    """
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    places |= _way_down(config) | _way_up(config)
    if config.mid_block_type is not None:
        places |= _resnet("mid_block.resnets.0", "middle_block.0")
    if config.mid_block_type == "UNetMidBlock2DCrossAttn":
        places["mid_block.attentions.0"] = "middle_block.1"
        places |= _resnet("mid_block.resnets.1", "middle_block.2")
    return places


def _way_down(config: UNetConfig) -> dict[str, str]:
    levels = len(config.block_out_channels)
    layers, places, number = per_level(config.layers_per_block, levels), dict[str, str](), 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(layers[level]):
            places |= _step(f"down_blocks.{level}", layer, kind, f"input_blocks.{number}")
            number += 1
        if level < levels - 1:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    return places


def _way_up(config: UNetConfig) -> dict[str, str]:
    levels = len(config.block_out_channels)
    layers, places, number = per_level(config.layers_per_block, levels), dict[str, str](), 0
    for block, kind in enumerate(config.up_block_types):
        for layer in range(layers[levels - 1 - block] + 1):
            places |= _step(f"up_blocks.{block}", layer, kind, f"output_blocks.{number}")
            number += 1
        if block < levels - 1:
            behind = 2 if kind.startswith("CrossAttn") else 1
            theirs = f"output_blocks.{number - 1}.{behind}.conv"
            places[f"up_blocks.{block}.upsamplers.0.conv"] = theirs
    return places


def _step(block: str, layer: int, kind: str, theirs: str) -> dict[str, str]:
    """A ResNet block and, where there is one, the transformer behind it."""
    places = _resnet(f"{block}.resnets.{layer}", f"{theirs}.0")
    if kind.startswith("CrossAttn"):
        places[f"{block}.attentions.{layer}"] = f"{theirs}.1"
    return places


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _RESNET.items()}


#: Layers of the attention: ours → theirs, where they are 1×1 convolutions and not matrices.
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Module of ours → module of theirs, for an AutoencoderKL; what is not listed keeps its name.

    An AutoencoderTiny has no place there: all its names stay.
    """
    full = {**DEFAULTS, **config}
    if full.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return {}
    levels, layers = len(full["block_out_channels"]), int(full["layers_per_block"])
    places: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        places[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for number in (0, 1):
            ours, theirs = f"{half}.mid_block.resnets.{number}", f"{half}.mid.block_{number + 1}"
            places |= _vae_resnet(ours, theirs)
        places |= {
            f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}"
            for a, b in _ATTENTION.items()
        }
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            places |= _vae_resnet(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        for layer in range(layers + 1):
            places |= _vae_resnet(f"{up}.resnets.{layer}", f"decoder.up.{level}.block.{layer}")
        places[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        places[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return places


def is_attention(name: str) -> bool:
    """Whether a weight of ours is a matrix that they keep as a 1×1 convolution."""
    return ".attentions." in name and name.endswith("weight") and "group_norm" not in name


def _vae_resnet(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}


CLIP_PREFIX, OPENCLIP_PREFIX = "cond_stage_model.transformer.", "cond_stage_model.model."
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def is_openclip(config: Mapping[str, Any]) -> bool:
    """Whether a tower of this configuration is kept the way of OpenCLIP."""
    return config.get("hidden_act", "quick_gelu") == "gelu"


def is_spare(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a key is part of OpenCLIP's tower and of no use to a tower of this configuration.

    That is the last layer, which Stable Diffusion 2 leaves out, and what OpenCLIP has beside the
    layers. Programs that build the whole tower look for them.
    """
    last = f"{OPENCLIP_PREFIX}transformer.resblocks.{config['num_hidden_layers']}."
    beside = (f"{OPENCLIP_PREFIX}text_projection", f"{OPENCLIP_PREFIX}logit_scale")
    return key.startswith(last) or key in beside


def text_keys(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Key of the file → our names whose rows it holds, in their order."""
    if not is_openclip(config):
        return {f"{CLIP_PREFIX}text_model.{name}": (name,) for name in names}
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        key = OPENCLIP_PREFIX + _openclip_name(name)
        # The tower's own order is k, q, v or another; the fused matrix is always q, k, v.
        found[key] = tuple(sorted((*found.get(key, ()), name), key=_place_in_fused))
    return found


def _openclip_name(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    _, _, number, *inner, last = name.split(".")  # encoder.layers.N.….weight
    module, block = ".".join(inner), f"transformer.resblocks.{number}"
    if module in _LAYER:
        return f"{block}.{_LAYER[module]}.{last}"
    return f"{block}.attn.in_proj_{last}"


def _place_in_fused(name: str) -> int:
    return next((i for i, part in enumerate("qkv") if f".{part}_proj." in name), 0)
