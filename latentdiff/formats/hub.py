"""From what a user names as a model to a local folder; the only place that may use the network."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from latentdiff.embedded import named
from latentdiff.errors import UserError
from latentdiff.weights import STAND_INS, TEXT_STEM, UNET_STEM, VAE_STEM

#: owner/name, as the Hugging Face hub spells its ids.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Part → how the names of its weights begin.
_STEMS = {"unet": UNET_STEM, "vae": VAE_STEM, "text_encoder": TEXT_STEM}
#: What a Stable Diffusion folder needs; leaves out other formats, half-precision copies and ONNX.
_PATTERNS = [
    "*.json",
    "*/*.json",
    "tokenizer/*.txt",
    *(f"{part}/{stem}*.safetensors" for part, stem in _STEMS.items()),
    f"{VAE_STEM}*.safetensors",  # of an autoencoder alone
    f"{TEXT_STEM}*.safetensors",  # of a safety checker
    f"safety_checker/{TEXT_STEM}*.safetensors",
]
_VARIANTS = (*STAND_INS, "non_ema")


def resolve_folder(
    folder_or_hub_id: str | Path, revision: str | None = None, variant: str | None = None
) -> Path:
    """The local folder behind a path or hub id.

    Args:    folder_or_hub_id: an existing folder, never looked up on the network; `embedded`, the
             model of the package; otherwise `owner/name` on the Hugging Face hub, downloaded once
             into its cache.
             revision: branch, tag or commit on the hub.
             variant: download these weights too, for example fp16. Without it, parts that have
             half-precision weights alone get those.
    Raises:  UserError: neither; a file; or the hub does not have it or cannot be reached.
    """
    path = Path(named(folder_or_hub_id)).expanduser()
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
    """Fetch a model: the plain weights or the variant; then those in half precision of parts that
    have no others, as `read_weights` takes them."""
    from huggingface_hub import snapshot_download

    others = [other for other in _VARIANTS if other != variant]

    def get(patterns: list[str]) -> Path:
        ignored = [f"*.{other}*" for other in others]
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored
            )
        )

    try:
        found = get(_PATTERNS)
        # What the repository holds is known only by asking for it; most have the plain files.
        for stand_in, ending in (("", ".bin"), *product(STAND_INS, (".safetensors", ".bin"))):
            others = [other for other in others if other != stand_in]
            lacking = _lacking(found, others)
            if stand_in and variant:  # which is not replaced where it must be
                lacking = [part for part in lacking if part != "unet"]
            if lacking:
                dot = f".{stand_in}*" if stand_in else ""
                # Weights, and the index of those that are in shards.
                kinds = (f"*{dot}{ending}", f"*{dot}.json")
                get([f"{part}/{kind}" for part in lacking for kind in kinds])
    except Exception as error:
        # The hub's client raises a dozen types, of httpx too; each means that there is no model.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"no folder {name} here, and it could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}). Check the spelling, the revision and the network."
        ) from error
    return found


def _lacking(folder: Path, others: Collection[str]) -> list[str]:
    """Parts without a file of weights; files of the variants `others` do not count."""

    def counts(file: Path) -> bool:
        weights = file.suffix in (".safetensors", ".bin")
        return weights and not any(fnmatch(file.name, f"*.{other}*") for other in others)

    return [part for part in _STEMS if not any(map(counts, (folder / part).glob("*")))]
