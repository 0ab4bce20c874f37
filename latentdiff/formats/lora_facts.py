"""What a LoRA file says about itself: layout, ranks, scale, what it is for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

#: The first of a pair of matrices, rank × inputs, in kohya's, diffusers' and PEFT's words.
_DOWN = re.compile(r"(lora_down|lora_A|lora\.down|lora_A\.default)\.weight$")
#: Keys and values of cross-attention, whose inputs are text states.
_OF_CONTEXT = re.compile(r"attn2[._](to_k|to_v|processor[._]to_[kv])")
#: Other ways to write a small change of a large matrix.
_KIN = {"hada_w1_a": "LoHa", "lokr_w1": "LoKr", "oft_blocks": "OFT", "ia3": "IA3"}
#: Columns of a matrix behind the text → the model whose text states are that wide.
_BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA file is."""

    layout: str
    """kohya, diffusers, or the name of a kin such as LoHa."""
    ranks: tuple[int, ...]
    """Every rank that occurs, the most frequent first."""
    alphas: tuple[float, ...]
    """Every alpha that occurs; none where the file does not say: alpha = rank."""
    targets: dict[str, int]
    """Part of the model → how many of its layers are changed."""
    base: str | None
    """The model it was made for, judged by the width of text states."""
    dora: bool
    """Whether magnitudes are learned too (DoRA)."""


def is_lora(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are a LoRA or its kin."""
    return any(_DOWN.search(n) or any(kin in n for kin in _KIN) for n in names)


def lora_facts(tensors: Mapping[str, Tensor]) -> LoraFacts:
    """Describe a LoRA from its tensors."""
    downs = {name: t for name, t in tensors.items() if _DOWN.search(name)}
    ranks = Counter(int(t.shape[0]) for t in downs.values())
    scales = (t for name, t in tensors.items() if name.endswith(".alpha") and t.numel() == 1)
    alphas = Counter(float(t) for t in scales)
    width = next((int(t.shape[1]) for name, t in downs.items() if _OF_CONTEXT.search(name)), 0)
    return LoraFacts(
        layout=_layout(tensors),
        ranks=tuple(rank for rank, _ in ranks.most_common()),
        alphas=tuple(alpha for alpha, _ in alphas.most_common()),
        targets=dict(sorted(Counter(_part(name) for name in downs).items())),
        base=_BASES.get(width, f"context of {width} channels" if width else None),
        dora=any("dora_scale" in n or "lora_magnitude_vector" in n for n in tensors),
    )


def _layout(names: Mapping[str, object]) -> str:
    for kin, name in _KIN.items():
        if any(kin in key for key in names):
            return name
    flat = any(key.startswith(("lora_unet_", "lora_te")) for key in names)
    return "kohya" if flat else "diffusers"


def _part(name: str) -> str:
    return "text encoder" if name.startswith(("lora_te", "text_encoder", "te_")) else "U-Net"
