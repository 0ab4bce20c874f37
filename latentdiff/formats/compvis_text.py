"""Where the text tower's weights stand in single files: two layouts, after two CLIPs.

Stable Diffusion 1.x keeps transformers' CLIPTextModel, name by name. 2.x keeps OpenCLIP's tower:
other names, and queries, keys and values of a layer below each other in one matrix. OpenCLIP's is
written for towers with its exact GELU, the other one for OpenAI's approximation of it.

Sources: github.com/Stability-AI/stablediffusion, ldm/modules/encoders/modules.py;
github.com/openai/CLIP, clip/model.py, whose names OpenCLIP has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

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
