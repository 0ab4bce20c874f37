"""Where each module of the U-Net stands in CompVis' code, which names the keys of single files.

There the way down and the way up are two flat rows, `input_blocks` and `output_blocks`, counted
through all resolutions: conv_in is input block 0, then every ResNet block with its transformer is
one, then every halving. A doubling is the last entry of the output block before it.

Source: Rombach et al.'s code, github.com/CompVis/stable-diffusion,
ldm/modules/diffusionmodules/openaimodel.py.
"""

from __future__ import annotations

from latentdiff.models.unet_config import UNetConfig, per_level

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
