"""What a file of weights is, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentdiff.errors import UserError
from latentdiff.formats.folder import SPECIAL_INPUTS
from latentdiff.formats.key_map import UNET_PREFIX, VAE_PREFIX
from latentdiff.formats.lora import adapter_kind
from latentdiff.formats.sd_facts import VERSIONS

Shapes = Mapping[str, tuple[int, ...]]
#: Metadata of a safetensors file: the configuration of a model that we wrote, as JSON.
CONFIGURATION = "latentdiff.configuration"
#: A word's vectors in a file that holds nothing else: no fewer numbers each, no more of them.
_WORD_WIDTH, _WORD_VECTORS = 64, 75
_WORD = re.compile(r"^string_to_param\.|^emb_params$|^<.*>$|^clip_[lg]$")
_FIRST = UNET_PREFIX + "input_blocks.0.0.weight"
#: Input channels of a Stable Diffusion that opens → what it is for, besides text to image.
INPUTS = {4: "", 9: " for inpainting"}
#: Beginning or middle of a key → what has such keys; the first that is found counts.
_OTHERS = (
    (r"^conditioner\.embedders\.1\.", "Stable Diffusion XL"),
    (r"^conditioner\.embedders\.0\.", "the refiner of Stable Diffusion XL"),
    (r"joint_blocks\.\d", "Stable Diffusion 3"),
    (r"double_blocks\.\d", "FLUX"),
    (r"^control_model\.|^controlnet_cond_embedding\.|^input_hint_block\.", "a ControlNet"),
    (r"motion_modules\.\d", "a motion module of AnimateDiff"),
    (r"^down_blocks\.\d+\.(resnets|attentions)\.", "the U-Net of a diffusers folder, alone"),
    (r"^(encoder|decoder)\.(down|up)_blocks\.", "the autoencoder of a diffusers folder, alone"),
    (r"^(encoder|decoder)\.(down|up)\.\d+\.block\.", "an autoencoder alone"),
    (r"^(text_model\.)?encoder\.layers\.\d+\.self_attn\.", "a CLIP text encoder alone"),
    (r"^(diffusion_model\.)?input_blocks\.\d", "the U-Net of a single file, alone"),
)
#: What a whole file has besides the U-Net, by how the keys begin.
_OTHER_PARTS = {VAE_PREFIX: "autoencoder", "cond_stage_model.": "text encoder"}


@dataclass(frozen=True)
class Identity:
    """What a file is."""

    name: str
    """For people: Stable Diffusion 1.x, a depth model …"""
    version: str | None = None
    """1 or 2 for a Stable Diffusion that opens, `own` for a file with its configuration."""
    kind: Literal["model", "adapter", "word"] = "model"
    """Whole or part of a model; a LoRA or its kin; a textual inversion."""

    @property
    def is_supported(self) -> bool:
        """Whether it opens as a model."""
        return self.version is not None


def identify(shapes: Shapes, metadata: Mapping[str, str]) -> Identity:
    """Name what a file is.

    Args:    shapes: of its tensors.  metadata: of a safetensors file.
    """
    if CONFIGURATION in metadata:
        return Identity("a text-to-image model with its configuration (latentdiff)", "own")
    if adapter := adapter_kind(shapes):
        return Identity(adapter, kind="adapter")
    if any(map(_WORD.search, shapes)) or _is_bare_word(shapes):
        return Identity("a textual inversion", kind="word")
    for pattern, name in _OTHERS:
        if any(re.search(pattern, key) for key in shapes):
            return Identity(name)
    if len(shapes.get(_FIRST, ())) == 4:
        return _stable_diffusion(shapes)
    parts = [name for name, found in _other_parts(shapes).items() if found]
    if parts:
        return Identity(f"the {' and '.join(parts)} of a single file, without the U-Net")
    some = ", ".join(sorted(shapes)[:3])
    return Identity(f"something unknown (keys such as {some})" if some else "without tensors")


def refuse_unsupported(identity: Identity, where: object) -> None:
    """Raises: UserError: naming what the file is, unless it can be opened."""
    if not identity.is_supported:
        lacks = identity.name.endswith("without its autoencoder")
        raise UserError(
            f"{where} is {identity.name}, which does not open as a text-to-image model. Stable "
            "Diffusion 1.x and 2.x checkpoints do, and files written here."
            + " Name an autoencoder for it with vae= or --vae."
            * lacks
        )


def _is_bare_word(shapes: Shapes) -> bool:
    """Whether the one tensor of a file could be vectors, named by a word without marks."""
    if len(shapes) != 1:
        return False
    ((name, shape),) = shapes.items()
    rows = 1 if len(shape) == 1 else shape[0] if shape else 0
    fits = len(shape) in (1, 2) and rows <= _WORD_VECTORS and shape[-1] >= _WORD_WIDTH
    return fits and not name.endswith((".weight", ".bias"))


def _stable_diffusion(shapes: Shapes) -> Identity:
    channels, width = input_channels(shapes), context_width(shapes)
    version = VERSIONS.get(width or 0)
    if any(key.startswith(UNET_PREFIX + "label_emb.") for key in shapes):
        other = "Stable unCLIP" if version == "2" else "Stable Diffusion XL (its U-Net)"
        return Identity(other)
    of = f" of Stable Diffusion {version}.x" if version else ""
    if channels in SPECIAL_INPUTS:
        return Identity(SPECIAL_INPUTS[channels] + of)
    if version is None or channels not in INPUTS:
        return Identity(
            f"a diffusion model of a size of its own ({channels} input channels, context of "
            f"{width}) that does not say its configuration"
        )
    lacking = [part for part, found in _other_parts(shapes).items() if not found]
    name = f"Stable Diffusion {version}.x{INPUTS[channels]}"
    if lacking:
        return Identity(f"{name} without its {' and '.join(lacking)}")
    return Identity(name, version)


def input_channels(shapes: Shapes) -> int:
    """Channels of the first convolution of a U-Net in CompVis' layout."""
    return shapes[_FIRST][1]


def _other_parts(shapes: Shapes) -> dict[str, bool]:
    """Part beside the U-Net → whether the file has anything of it."""
    return {
        name: any(key.startswith(start) for key in shapes) for start, name in _OTHER_PARTS.items()
    }


def context_width(shapes: Shapes) -> int | None:
    """Channels of the text states that a U-Net in CompVis' layout takes; None: no attention."""
    found = (
        shape[1]
        for key, shape in shapes.items()
        if key.startswith(UNET_PREFIX) and key.endswith(".attn2.to_k.weight") and len(shape) > 1
    )
    return next(found, None)
