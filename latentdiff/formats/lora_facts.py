"""What a LoRA file says about itself: kind, layout, ranks, scale, what it is for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.formats.lora_names import COMFY_UNET, bundled_words, plain_name, split_key
from latentdiff.formats.lora_settings import adapter_settings, is_stabilised, said_alphas
from latentdiff.tensor_file import TensorFile

#: Other ways to write a small change of a large matrix, by how the last words of a key begin.
_KIN = {
    "hada_": "a LoHa (LyCORIS)",
    "lokr_": "a LoKr (LyCORIS)",
    "oft_": "an OFT adapter",
    "ia3_": "an IA3 adapter",
}
_KIN_ROLE = re.compile(r"\.((?:hada|lokr|oft|ia3)_\w+)")
#: Matrices that are rank × inputs, or rank × a factor of them.
_RANKED = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
#: Keys and values of cross-attention, whose inputs are text states.
_OF_CONTEXT = re.compile(r"attn2[._]to_[kv]$")
#: Columns of a matrix behind the text → the model whose text states are that wide.
BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA file is."""

    layout: str
    """How layers are called: kohya, ComfyUI, diffusers or peft."""
    ranks: tuple[int, ...]
    """Every rank that occurs, the most frequent first."""
    alphas: tuple[float, ...]
    """Every alpha that the file says, in tensors or settings."""
    without_alpha: int
    """How many layers it says no alpha for, which means alpha = rank."""
    targets: dict[str, int]
    """Part of the model → how many of its layers are changed."""
    base: str | None
    """The model it was made for, judged by the width of text states."""
    dora: bool
    """Whether magnitudes are learned too (DoRA)."""
    stabilised: bool
    """Whether changes are divided by the rank's root (rank-stabilised LoRA)."""
    bundled: tuple[str, ...]
    """Names of learned words beside it in the file."""


def adapter_kind(names: Iterable[str]) -> str | None:
    """What tensors of these names are: a LoRA, one of its kin by name, or None: neither."""
    found = None
    for name in names:
        if kin := _KIN_ROLE.search(name):
            return next(kind for start, kind in _KIN.items() if kin[1].startswith(start))
        if split_key(name)[1] == "down":
            found = "a LoRA"
    return found


def lora_facts(file: TensorFile) -> LoraFacts:
    """Describe a LoRA, or one of its kin, from its tensors and settings."""
    layers = _layers(file.tensors)
    plain = [plain_name(name) for name in layers]
    settings, alphas_said = dict[str, Any](), dict[str, float]()
    # What is wrong with settings is said by reading the file to use it; this describes the rest.
    with suppress(ValueError):
        settings = adapter_settings(file.path, file.metadata)
        alphas_said = said_alphas(plain, settings)
    ranks = Counter(rank for roles in layers.values() if (rank := _rank(roles)))
    said = [_alpha(layers[n], alphas_said.get(p)) for n, p in zip(layers, plain, strict=True)]
    alphas = Counter(alpha for alpha in said if alpha is not None)
    width = next((_inputs(roles) for name, roles in layers.items() if _OF_CONTEXT.search(name)), 0)
    return LoraFacts(
        layout=_layout(file.tensors),
        ranks=tuple(rank for rank, _ in ranks.most_common()),
        alphas=tuple(alpha for alpha, _ in alphas.most_common()),
        without_alpha=said.count(None),
        targets=dict(sorted(Counter(map(_part, plain)).items())),
        base=BASES.get(width, f"context of {width} channels" if width else None),
        dora=any("magnitude" in roles for roles in layers.values()),
        stabilised=any(is_stabilised(name, settings) for name in plain),
        bundled=bundled_words(file.tensors),
    )


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer → what it has, by role; those alone that something is added to."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, role = split_key(key)
        if kin := _KIN_ROLE.search(key):
            name, role = key[: kin.start()], kin[1]
        if role is not None:
            found.setdefault(name, {})[role] = tensor
    return {
        name: roles for name, roles in found.items() if roles.keys() - {"up", "alpha", "magnitude"}
    }


def _rank(roles: Mapping[str, Tensor]) -> int | None:
    shapes = (roles[role].shape for role in _RANKED if role in roles)
    return next((int(shape[0]) for shape in shapes if shape), None)


def _inputs(roles: Mapping[str, Tensor]) -> int:
    """Columns of the matrix that is changed; 0 where they are not to be seen."""
    outer, inner = (
        next((t for end in ("", "_b") if (t := roles.get(f"lokr_w{i}{end}")) is not None), None)
        for i in (1, 2)
    )
    if outer is not None and inner is not None and min(outer.ndim, inner.ndim) > 1:
        return int(outer.shape[1] * inner.shape[1])  # of a Kronecker product
    matrices = (roles[role] for role in ("down", "hada_w1_b") if role in roles)
    return next((int(m.shape[1]) for m in matrices if m.ndim > 1), 0)


def _alpha(roles: Mapping[str, Tensor], said: float | None) -> float | None:
    """The alpha of a layer, by its tensor or the settings; None: neither says one."""
    if "alpha" not in roles:
        return said
    alpha = roles["alpha"]
    return float(alpha) if alpha.numel() == 1 and not alpha.is_complex() else None


def _layout(names: Iterable[str]) -> str:
    for name in names:
        if name.startswith(("lora_unet_", "lora_te")):
            return "kohya"
        if name.startswith("base_model."):
            return "peft"
        if name.startswith((COMFY_UNET, "text_encoders.")):
            return "ComfyUI"
    return "diffusers"


def _part(name: str) -> str:
    return "text encoder" if name.startswith(("lora_te", "text_encoder", "te_")) else "U-Net"
