"""The key map of single files: against the original code's names, and as a bijection."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.formats.folder import empty_unet
from latentdiff.formats.key_map import PARTS, compvis_layout, from_compvis, to_compvis
from latentdiff.formats.sd_facts import sd_configuration
from latentdiff.models.autoencoder import empty_autoencoder
from latentdiff.models.clip_text import empty_text_tower
from latentdiff.models.unet_config import UNetConfig, config_from_dict

#: sha256 of the sorted lines "name shape" of U-Net and autoencoder, printed by the original classes
#: (UNetModel, Encoder, Decoder) built from the original YAML files: CompVis/stable-diffusion at
#: 21f890f, Stability-AI/stablediffusion at cf1d67a. 934 names each.
ORIGINAL = {
    "1": "09678d6787c517c50efc690a25e1c5613adb50356c9dcf28e9d6d96db472038e",
    "2": "81412269aeb1fb93f6ac96a7b4b436da8aefd94f84c1bf0caf2f10c4f91c1ae3",
}
#: The same of the text tower of openai/CLIP's model.py at d05afc4 with OpenCLIP's ViT-H/14 sizes,
#: without the last layer, text_projection and logit_scale. 280 names.
OPENCLIP = "9142aa1e1df1305fcfbbd4a75b83539ab62ef365b1d688c6b594522390e7b9ce"
TEXT = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 5}  # fmt: skip
VAE = {"block_out_channels": [8, 8, 16], "norm_num_groups": 4, "layers_per_block": 2}
SMALL = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=2,
    cross_attention_dim=12,
)


def parts(unet: UNetConfig, vae: Any, text: Any) -> dict[str, dict[str, Tensor]]:
    networks = {
        "unet": empty_unet(unet),
        "vae": empty_autoencoder(vae, "test"),
        "text_encoder": empty_text_tower(text, "test"),
    }
    return {part: dict(network.state_dict()) for part, network in networks.items()}


def digest(shapes: dict[str, Tensor]) -> str:
    lines = [f"{name} {tuple(t.shape)}" for name, t in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("version", ["1", "2"])
def test_names_and_shapes_are_those_of_the_original_code(version: str) -> None:
    config = sd_configuration(version, "eps")
    unet = config_from_dict(config["unet"])
    states = parts(unet, config["vae"], config["text_encoder"])
    layout = compvis_layout(unet, config["vae"], config["text_encoder"], states)
    written = [to_compvis(states[part], layout[part], part) for part in PARTS]
    assert digest(written[0] | written[1]) == ORIGINAL[version]
    if version == "2":
        assert digest(written[2]) == OPENCLIP
    else:
        prefix = "cond_stage_model.transformer.text_model."
        assert written[2].keys() == {prefix + name for name in states["text_encoder"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": (2, 1)},
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"time_embedding_type": "fourier"},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
        {"transformer_layers_per_block": 2, "use_linear_projection": True},
        {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2},
        {
            "block_out_channels": (8,),
            "down_block_types": ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_every_weight_has_one_place_and_comes_back(
    changes: dict[str, Any], activation: str
) -> None:
    unet, text = dataclasses.replace(SMALL, **changes), TEXT | {"hidden_act": activation}
    shapes = parts(unet, VAE, text)
    layout = compvis_layout(unet, VAE, text, shapes)
    held = [name for part in PARTS for names in layout[part].values() for name in names]
    assert sorted(held) == sorted(name for part in PARTS for name in shapes[part])
    keys = [key for part in PARTS for key in layout[part]]
    assert len(keys) == len(set(keys))

    states = {p: {n: torch.randn(t.shape) for n, t in s.items()} for p, s in shapes.items()}
    file: dict[str, Tensor] = {}
    for part in PARTS:
        file |= to_compvis(states[part], layout[part], part)
    for part in PARTS:
        back = from_compvis(file, layout[part], shapes[part])
        assert back.keys() == states[part].keys()
        assert all(torch.equal(back[name], states[part][name]) for name in back)


def test_queries_keys_and_values_are_below_each_other() -> None:
    text = TEXT | {"hidden_act": "gelu"}
    shapes = parts(SMALL, VAE, text)
    layout = compvis_layout(SMALL, VAE, text, shapes)
    start = "encoder.layers.1.self_attn"
    assert layout["text_encoder"][
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    ] == tuple(f"{start}.{letter}_proj.weight" for letter in "qkv")


def test_decoder_levels_count_from_the_finest() -> None:
    layout = compvis_layout(SMALL, VAE, TEXT, parts(SMALL, VAE, TEXT))
    assert layout["vae"]["first_stage_model.decoder.up.0.block.2.conv1.weight"] == (
        "decoder.up_blocks.2.resnets.2.conv1.weight",
    )
    assert layout["vae"]["first_stage_model.decoder.up.2.upsample.conv.weight"] == (
        "decoder.up_blocks.0.upsamplers.0.conv.weight",
    )
    key = "model.diffusion_model.output_blocks.1.1.conv.weight"
    assert layout["unet"][key] == ("up_blocks.0.upsamplers.0.conv.weight",)
