"""Which layer a LoRA file means by a name, and what the file is when it means none of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

#: The networks that a LoRA may change, as diffusers calls them.
PARTS = ("unet", "text_encoder")
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
#: Adapters of other kinds, by a piece of their keys.
_KINDS = {
    "hada_w": "it is a LoHa (LyCORIS), not a LoRA",
    "lokr_w": "it is a LoKr (LyCORIS), not a LoRA",
    "lora_mid.": "it is a LoCon with a Tucker decomposition (LyCORIS), not a plain LoRA",
    "oft_blocks": "it is an OFT adapter, not a LoRA",
    "oft_diag": "it is an OFT adapter, not a LoRA",
    ".ia3_": "it is an IA3 adapter, not a LoRA",
    "lora_B.bias": "its LoRA has biases, which are not supported",
    "lora_embedding": "it changes an embedding table, which is not supported",
}
#: Models of other families, by how a key begins.
_FAMILIES = {
    "lora_te2_": "Stable Diffusion XL (it has a second text encoder)",
    "text_encoder_2.": "Stable Diffusion XL (it has a second text encoder)",
    "lora_unet_input_blocks_": "Stable Diffusion XL (or a tool that shares its names of blocks)",
    "lora_unet_output_blocks_": "Stable Diffusion XL (or a tool that shares its names of blocks)",
    "lora_unet_double_blocks_": "Flux",
    "lora_unet_single_blocks_": "Flux",
    "lora_transformer_": "a diffusion transformer (Flux, Stable Diffusion 3 or later)",
    "transformer.": "a diffusion transformer (Flux, Stable Diffusion 3 or later)",
    "diffusion_model.": "another family of models",
}
#: diffusers' first spelling, whose layers are named after what is done with them.
_OLD_ATTENTION = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")
#: What a tensor is of its layer, by how its key ends; kohya's, diffusers' and peft's words.
_ROLES = {
    "down": r"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A(?:\.\w+)??)\.weight$",
    "up": r"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B(?:\.\w+)??)\.weight$",
    "alpha": r"\.alpha$",
    "magnitude": r"\.(?:dora_scale|lora_magnitude_vector(?:\.\w+)*)$",
}


def kohya_name(part: str, module: str) -> str:
    """How kohya's scripts write a layer's name."""
    return _KOHYA[part] + module.replace(".", "_")


def split_key(key: str) -> tuple[str, str | None]:
    """A key's layer name and what it is of that layer: down, up, alpha, magnitude."""
    if old := _OLD_ATTENTION.search(key):
        name, (which, role) = key[: old.start()], old.groups()
        if ".self_attn" in name:
            return f"{name}.{which}_proj", role
        return f"{name}.to_{which}" + (".0" if which == "out" else ""), role
    for role, pattern in _ROLES.items():
        if found := re.search(pattern, key):
            return key[: found.start()], role
    return key, None


def plain_name(name: str) -> str:
    """A layer's name with one spelling of its prefix; kohya's names stay as they are."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("lora_te1_"):  # the same tower, in files of tools that know two
        return name.replace("lora_te1_", "lora_te_", 1)
    if name.startswith(("lora_unet_", "lora_te_")):
        return name
    name = name.replace("text_encoder.text_model.", "text_encoder.", 1)
    return name if name.startswith(("unet.", "text_encoder.")) else f"unet.{name}"


def foreign_kind(keys: Iterable[str]) -> str:
    """What a file with these keys is, if it is nothing for Stable Diffusion 1.x / 2.x; or ""."""
    for key in keys:
        for piece, text in _KINDS.items():
            if piece in key:
                return f"{text} ({key})."
        for start, family in _FAMILIES.items():
            if key.startswith(start):
                return f"it is for {family}; here Stable Diffusion 1.x / 2.x models are changed."
        if re.match(r"(unet\.)?(add_embedding|label_emb)\.", key):
            return "it is for Stable Diffusion XL; here 1.x / 2.x models are changed."
    return ""


def places(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[str, str]]:
    """Every name that a file may use → (part, module).

    Args:    layers: part → module name → weight.
    """
    found: dict[str, tuple[str, str]] = {}
    for part, own in layers.items():
        for module in own:
            found[f"{part}.{module}"] = (part, module)
            found[kohya_name(part, module)] = (part, module)
    return found
