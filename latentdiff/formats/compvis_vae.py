"""Where each module of the autoencoder stands in CompVis' code.

The decoder's resolutions count from the finest there, from the coarsest here.

Source: github.com/CompVis/stable-diffusion, ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.models.vae import DEFAULTS

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
            places |= _resnet(ours, theirs)
        places |= {
            f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}"
            for a, b in _ATTENTION.items()
        }
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers):
            places |= _resnet(f"{down}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        for layer in range(layers + 1):
            places |= _resnet(f"{up}.resnets.{layer}", f"decoder.up.{level}.block.{layer}")
        places[f"{down}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        places[f"{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return places


def is_attention(name: str) -> bool:
    """Whether a weight of ours is a matrix that they keep as a 1×1 convolution."""
    return ".attentions." in name and name.endswith("weight") and "group_norm" not in name


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}
