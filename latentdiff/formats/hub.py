"""From what a user names as a model to a local folder; the only place that may use the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

#: owner/name, as the Hugging Face hub spells its ids.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: What a Stable Diffusion folder needs; leaves out other formats, half-precision copies and ONNX.
_PATTERNS = [
    "*.json",
    "*/*.json",
    "tokenizer/*.txt",
    "unet/diffusion_pytorch_model*.safetensors",
    "vae/diffusion_pytorch_model*.safetensors",
    "text_encoder/model*.safetensors",
]
_IGNORED = ["*.fp16*", "*.bf16*", "*.non_ema*"]
#: Taken where a part has no safetensors.
_PICKLES = ["unet/*.bin", "vae/*.bin", "text_encoder/*.bin"]


def resolve_folder(
    folder_or_hub_id: str | Path, revision: str | None = None, variant: str | None = None
) -> Path:
    """The local folder behind a path or hub id.

    Args:    folder_or_hub_id: an existing folder, never looked up on the network; otherwise
             `owner/name` on the Hugging Face hub, downloaded once into its cache.
             revision: branch, tag or commit on the hub.
             variant: download these weights too, for example fp16.
    Raises:  UserError: neither; a file; or the hub does not have it or cannot be reached.
    """
    path = Path(folder_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"the model must be a folder; {path} is a file.")
    name = str(folder_or_hub_id)
    parent = name.split("/")[0]
    if isinstance(folder_or_hub_id, Path) or not _HUB_ID.fullmatch(name) or Path(parent).is_dir():
        raise UserError(
            f"no model at {name}: this folder does not exist. "
            "Give an existing folder, or a Hugging Face id such as owner/name."
        )
    return _download(name, revision, variant)


def _download(name: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import snapshot_download

    ignored = [pattern for pattern in _IGNORED if variant is None or variant not in pattern]
    options: dict[str, Any] = {"revision": revision, "ignore_patterns": ignored}
    try:
        found = Path(snapshot_download(name, allow_patterns=_PATTERNS, **options))
        if any(not list(found.glob(f"{p.split('/')[0]}/*.safetensors")) for p in _PICKLES):
            found = Path(snapshot_download(name, allow_patterns=_PATTERNS + _PICKLES, **options))
    except Exception as error:
        # The hub's client raises a dozen types, of httpx too; each means that there is no model.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"no folder {name} here, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling, the revision and the network."
        ) from error
    return found
