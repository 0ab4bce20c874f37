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

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.unet_config import UNetConfig, per_level
from latentdiff.models.vae import DEFAULTS

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
CLIP_PREFIX, OPENCLIP_PREFIX = "cond_stage_model.transformer.", "cond_stage_model.model."
#: The averaged weights of a training, their names without dots.
EMA_PREFIX = "model_ema.diffusion_model"
PARTS = ("unet", "vae", "text_encoder")
State = Mapping[str, Tensor]
#: Key of the file → names in one part whose rows it holds, in order.
Keys = dict[str, tuple[str, ...]]

# Names of ours → of theirs, as regular expressions replaced one after the other.
_UNET = {
    r"^time_embedding\.linear_1": "time_embed.0",
    r"^time_embedding\.linear_2": "time_embed.2",
    r"^conv_in": "input_blocks.0.0",
    r"^conv_norm_out": "out.0",
    r"^conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    r"\.conv_norm_out": ".norm_out",
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"(down|up)_blocks\.(\d+)\.resnets": r"\1.\2.block",
    r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0": r"\1.\2.\3sample",
    r"conv_shortcut": "nin_shortcut",
}
_OPENCLIP = {
    r"^embeddings\.token_embedding": "token_embedding",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
    r"^final_layer_norm": "ln_final",
    r"^encoder\.layers": "transformer.resblocks",
    r"layer_norm(\d)": r"ln_\1",
    r"self_attn\.out_proj": "attn.out_proj",
    r"self_attn\.[qkv]_proj\.": "attn.in_proj_",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
}


def compvis_layout(
    unet: UNetConfig,
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    names: Mapping[str, Iterable[str]],
) -> dict[str, Keys]:
    """Which key of the file holds what, by part.

    Args:    unet, vae, text: the configurations of its parts.
             names: of the weights of each of `PARTS`.
    """
    unet_name, levels = unet_names(unet), len({**DEFAULTS, **vae}["block_out_channels"])
    return {
        "unet": {UNET_PREFIX + unet_name(name): (name,) for name in names["unet"]},
        "vae": {VAE_PREFIX + _vae_name(name, levels): (name,) for name in names["vae"]},
        "text_encoder": _text_keys(names["text_encoder"], text),
    }


def from_compvis(tensors: State, keys: Keys, shapes: State) -> dict[str, Tensor]:
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


def from_compvis_vae(tensors: State, names: State, levels: int) -> dict[str, Tensor]:
    """An autoencoder's tensors under our names, whichever names they have.

    Args:    tensors: with `VAE_PREFIX` before theirs or not, of a whole model too.
             names: our names.  levels: of resolution.
    """
    inner = {k.removeprefix(VAE_PREFIX): t for k, t in tensors.items() if k.startswith(VAE_PREFIX)}
    ours = {_vae_name(name, levels): name for name in names}
    return {ours.get(key, key): tensor for key, tensor in (inner or tensors).items()}


def to_compvis(state: State, keys: Keys, part: str) -> dict[str, Tensor]:
    """The tensors of one part under the keys of the file; the opposite of `from_compvis`."""
    tensors = {}
    for key, names in keys.items():
        pieces = [state[name] for name in names]
        tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if part == "vae" and _is_attention(names[0]):
            tensor = tensor[:, :, None, None]
        tensors[key] = tensor
    return tensors


def ema_key(key: str) -> str:
    """Where the averaged version of a U-Net's key is kept."""
    return EMA_PREFIX + key.removeprefix(UNET_PREFIX).replace(".", "")


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


def unet_names(config: UNetConfig) -> Callable[[str], str]:
    """The map from names of the U-Net's modules and weights to those in CompVis' code.

    Below a transformer they are the same. Random Fourier features, which that code does not have,
    keep their name.
    """
    blocks = [n + 1 for n in per_level(config.layers_per_block, len(config.block_out_channels))]
    # Of each level, the number of its first block in the row of all.
    down, up = list(accumulate(blocks, initial=1)), list(accumulate(blocks[::-1], initial=0))
    inside = {"resnets": 0, "attentions": 1}

    def theirs(name: str) -> str:
        match name.split("."):
            case ["down_blocks", level, "downsamplers" as kind, _, _, *rest]:
                block = f"input_blocks.{down[int(level) + 1] - 1}.0.op"
            case ["up_blocks", level, "upsamplers" as kind, _, *rest]:
                behind = 2 if config.up_block_types[int(level)].startswith("CrossAttn") else 1
                block = f"output_blocks.{up[int(level) + 1] - 1}.{behind}"
            case ["down_blocks", level, kind, layer, *rest]:
                block = f"input_blocks.{down[int(level)] + int(layer)}.{inside[kind]}"
            case ["up_blocks", level, kind, layer, *rest]:
                block = f"output_blocks.{up[int(level)] + int(layer)}.{inside[kind]}"
            case ["mid_block", kind, layer, *rest]:
                block = f"middle_block.{2 * int(layer) + inside[kind]}"
            case _:
                return _renamed(name, _UNET)
        if kind == "resnets":
            rest[:1] = [_RESNET[rest[0]]]
        return ".".join([block, *rest])

    return theirs


def _vae_name(name: str, levels: int) -> str:
    """Names of other autoencoders, such as the tiny one, are not in the table and stay."""
    from_the_finest = re.sub(
        r"(?<=up_blocks\.)\d+(?=\.(resnets|upsamplers)\.)",
        lambda found: str(levels - 1 - int(found[0])),
        name,
    )
    return _renamed(from_the_finest, _VAE)


def _text_keys(names: Iterable[str], config: Mapping[str, Any]) -> Keys:
    if not is_openclip(config):
        return {f"{CLIP_PREFIX}text_model.{name}": (name,) for name in names}
    found: Keys = {}
    for name in names:
        key = OPENCLIP_PREFIX + _renamed(name, _OPENCLIP)
        # The tower's own order is k, q, v or another; the fused matrix is always q, k, v.
        found[key] = tuple(sorted((*found.get(key, ()), name), key=_place_in_fused))
    return found


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = re.sub(ours, theirs, name)
    return name


def _place_in_fused(name: str) -> int:
    return next((i for i, part in enumerate("qkv") if f".{part}_proj." in name), 0)


def _is_attention(name: str) -> bool:
    """Whether a weight of ours is a matrix that they keep as a 1×1 convolution."""
    return ".attentions." in name and name.endswith("weight") and "group_norm" not in name


def _squeeze(tensor: Tensor, like: Tensor) -> Tensor:
    """A 1×1 convolution as the matrix that it is, or the other way round, where we have that."""
    same = {tensor.ndim, like.ndim} == {2, 4} and tensor.shape[:2] == like.shape[:2]
    return tensor.reshape(like.shape) if same and tensor.numel() == like.numel() else tensor
