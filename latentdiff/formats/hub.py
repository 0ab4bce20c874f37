"""From what a user names as a model to a local folder; the only place that may use the network."""

from __future__ import annotations

import re
from pathlib import Path

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
_IGNORED = ["*.fp16*", "*.non_ema*"]


def resolve_folder(folder_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The local folder behind a path or hub id.

    Args:    folder_or_hub_id: an existing folder, never looked up on the network; otherwise
             `owner/name` on the Hugging Face hub, downloaded once into its cache.
             revision: branch, tag or commit on the hub.
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
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
        )
    except Exception as error:
        # The hub's client raises a dozen types, of httpx too; each means that there is no model.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"no folder {name} here, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling, the revision and the network."
        ) from error
    return Path(found)
