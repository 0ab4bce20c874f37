"""Which layer a LoRA file means by a name, and what the file is when it means none of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping

#: The networks that a LoRA may change, as diffusers calls them.
PARTS = ("unet", "text_encoder")
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
#: Adapters of other kinds, by a piece of their keys.
_KINDS = {
    r"hada_w": "it is a LoHa (LyCORIS), not a LoRA",
    r"lokr_w": "it is a LoKr (LyCORIS), not a LoRA",
    r"lora_mid\.": "it is a LoCon with a Tucker decomposition (LyCORIS), not a plain LoRA",
    r"oft_blocks|oft_diag": "it is an OFT adapter, not a LoRA",
    r"\.ia3_": "it is an IA3 adapter, not a LoRA",
    r"lora_B(\.\w+)?\.bias$": "its LoRA has biases, which are not supported",
    r"lora_embedding": "it changes an embedding table, which is not supported",
    r"\.diff(_b)?$": "it holds differences of whole weights or biases (ComfyUI's bias_diff or "
    "full_diff), which are not supported; extract it again without them",
}
_XL = "Stable Diffusion XL"
_TRANSFORMER = "a diffusion transformer (Flux, Stable Diffusion 3 or later)"
#: Models of other families, by how a key begins; the first that any key has.
_FAMILIES = {
    r"(lora_unet_|diffusion_model\.)(double|single)_blocks[._]": "Flux",
    r"lora_transformer_|transformer\.": _TRANSFORMER,
    r"diffusion_model\.(?!input_blocks\.|middle_block\.|output_blocks\.|time_embed\.|out\.|"
    r"label_emb\.)": _TRANSFORMER,
    r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.": f"{_XL} (it has a second text encoder)",
    # Versions 1 and 2 have one block in each transformer of CompVis' names.
    r"(lora_unet_|diffusion_model\.)(input|middle|output)_block.*transformer_blocks[._][1-9]": _XL,
    r"(unet\.)?add_embedding\.|(unet\.|lora_unet_|diffusion_model\.)?label_emb[._]": _XL,
}
#: How the names of the text tower begin: diffusers', ComfyUI's, and those of peft, which saves one
#: network alone and says not which.
_TOWER = re.compile(
    r"(text_encoder|text_encoders\.clip_[lh]\.transformer)\.(text_model\.)?|text_model\."
    r"|(?=encoder\.layers\.)"
)
#: How the keys of learned words begin that trainers put into a LoRA file, for A1111.
BUNDLED = "bundle_emb."
#: ComfyUI's start of a U-Net's names, which are CompVis'.
COMFY_UNET = "diffusion_model."
#: diffusers' first spelling, whose layers are named after what is done with them.
_OLD_ATTENTION = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")
#: What a tensor is of its layer, by how its key ends; kohya's, diffusers' and peft's words.
_ROLES = {
    "down": r"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A(?:\.\w+)??)\.weight$",
    "up": r"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B(?:\.\w+)??)\.weight$",
    "alpha": r"\.alpha$",
    "magnitude": r"\.(?:dora_scale$|lora_magnitude_vector(?:\.|$))",
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
    """A layer's name with one spelling of its prefix; names of kohya and ComfyUI's U-Net stay."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("lora_te1_"):  # the same tower, in files of tools that know two
        return name.replace("lora_te1_", "lora_te_", 1)
    if name.startswith(("lora_unet_", "lora_te_", COMFY_UNET, "unet.")):
        return name
    if tower := _TOWER.match(name):
        return f"text_encoder.{name[tower.end() :]}"
    return f"unet.{name}"


def foreign_kind(keys: Collection[str]) -> str:
    """What a file with these keys is, if it is nothing for Stable Diffusion 1.x / 2.x; or ""."""
    for piece, text in _KINDS.items():
        if key := next((key for key in keys if re.search(piece, key)), None):
            return f"{text} ({key})."
    family = next((_FAMILIES[p] for p in _FAMILIES if any(re.match(p, key) for key in keys)), "")
    return family and f"it is for {family}; here Stable Diffusion 1.x / 2.x models are changed."


def bundled_words(keys: Iterable[str]) -> tuple[str, ...]:
    """Names of the learned words that a LoRA file holds besides."""
    names = (key.split(".")[1] for key in keys if key.startswith(BUNDLED))
    return tuple(dict.fromkeys(names))


def places(
    layers: Mapping[str, Iterable[str]], compvis: Callable[[str], str]
) -> dict[str, tuple[str, str]]:
    """Every name that a file may use → (part, module).

    Args:    layers: part → names of modules.
             compvis: a U-Net's module → its name in CompVis' code.
    """
    found: dict[str, tuple[str, str]] = {}
    for part, own in layers.items():
        for module in own:
            names = [f"{part}.{module}", kohya_name(part, module)]
            if part == "unet":
                theirs = compvis(module)
                names += [COMFY_UNET + theirs, kohya_name(part, theirs)]
            found |= dict.fromkeys(names, (part, module))
    return found
