"""Whether a model has the shapes of Stable Diffusion 1.x or 2.x, in all three of its parts.

Programs that open single files by their keys alone (A1111, ComfyUI) take every size from what
Stable Diffusion is, so one part of another size is enough to make a file unreadable there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from latentdiff.formats.components import Components
from latentdiff.formats.sd_facts import VERSIONS, sd_configuration, sd_unet
from latentdiff.models import clip_text, vae
from latentdiff.models.clip_vocabulary import CLIP, describe_tokenizer
from latentdiff.models.unet_config import UNetConfig, per_level

#: What no weight depends on, and heads, which can be written in two ways and are compared apart.
_FREE = {"sample_size", "upcast_attention", "dropout", "attention_head_dim"}
#: Settings that may be one number for all levels.
_PER_LEVEL = ("layers_per_block", "transformer_layers_per_block")


def sd_version(components: Components) -> str | None:
    """1 or 2 when every part is Stable Diffusion's, which other programs can open; else None."""
    return None if sd_differences(components) else VERSIONS[_context(components)]


def sd_differences(components: Components) -> dict[str, list[str]]:
    """What is not as in Stable Diffusion, by part; empty when all is.

    The version to compare with is the one whose text states are as wide, 1.x where none is.
    """
    version = VERSIONS.get(_context(components), "1")
    sd, text = sd_configuration(version, "eps"), components.text_encoder
    found = {
        "U-Net": _differing(_unet_facts(components.unet.config), _unet_facts(sd_unet(version))),
        "autoencoder": _differing(
            _vae_facts(components.autoencoder.config_dict()), _vae_facts(sd["vae"])
        ),
        "text encoder": _differing(
            _text_facts(text.config_dict()), _text_facts(sd["text_encoder"])
        ),
    }
    if not found["text encoder"] and CLIP not in describe_tokenizer(text.tokenizer):
        found["tokenizer"] = ["another vocabulary than CLIP's"]
    return {part: texts for part, texts in found.items() if texts}


def _context(components: Components) -> int:
    return components.unet.config.cross_attention_dim


def _differing(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {_plain(own.get(name))} instead of {_plain(value)}"
        for name, value in other.items()
        if _plain(own.get(name)) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    """Lists of JSON and tuples of ours alike."""
    return list(value) if isinstance(value, list | tuple) else value


def _unet_facts(config: UNetConfig) -> dict[str, Any]:
    kept = (field.name for field in dataclasses.fields(config) if field.name not in _FREE)
    levels = len(config.block_out_channels)
    # A number may also be written once for every level.
    spread = {name: per_level(getattr(config, name), levels) for name in _PER_LEVEL}
    return {name: getattr(config, name) for name in kept} | spread | {"heads": config.heads}


def _vae_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    full = {**vae.DEFAULTS, "_class_name": "AutoencoderKL", "shift_factor": None, **config}
    facts = {name: full[name] for name in ("_class_name", *vae.DEFAULTS)}
    # Those programs multiply by Stable Diffusion's factor and shift nothing.
    return facts | {"shift_factor": full["shift_factor"] or 0.0}


def _text_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    full = {**clip_text.DEFAULTS, **config}
    return {name: full[name] for name in clip_text.DEFAULTS}
