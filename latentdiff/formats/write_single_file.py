"""A whole model in one .safetensors file in CompVis' layout, written; see `single_file`.

The metadata has ModelSpec's fields, which other programs show and some read, and our configuration
files, with which any model comes back as it was and not only the sizes of Stable Diffusion.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.components import Components
from latentdiff.formats.compvis_keys import PARTS, Layout, compvis_layout, give
from latentdiff.formats.compvis_text import is_openclip
from latentdiff.formats.generation_config import generation_defaults
from latentdiff.formats.identify import CONFIGURATION
from latentdiff.formats.scheduler_config import write_scheduler
from latentdiff.formats.sd_likeness import sd_version
from latentdiff.formats.stated import MODELSPEC_WORDS
from latentdiff.models.clip_vocabulary import describe_tokenizer
from latentdiff.weight_files import save_tensors, stored_tensor

ENDING = ".safetensors"
#: Stands in the header while the tensors are written; their hash has as many characters.
_NO_HASH = "0x" + "0" * 64
_CODE = {
    "1": "https://github.com/CompVis/stable-diffusion",
    "2": "https://github.com/Stability-AI/stablediffusion",
}


def save_single_file(
    file: str | Path,
    components: Components,
    dtype: torch.dtype | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Write a model into one file, all at once; an older file of that name is replaced.

    Args:    file: its name must end in .safetensors.
             dtype: on disk; None: what each part was read from.
             title: for programs that show one; None: the file's name.
    Returns: the file.
    Raises:  UserError: another ending, a folder of that name, or it cannot be written.
    """
    components.check()
    target = Path(file).expanduser().absolute()
    check_target(target)
    dtypes = components.part_dtypes(dtype)
    states, layout = layout_of(components)
    tensors: dict[str, Tensor] = {}
    for part in PARTS:
        stored = {name: stored_tensor(name, t, dtypes[part]) for name, t in states[part].items()}
        tensors |= give(stored, getattr(layout, part), part)
    spare = components.spare if is_openclip(components.text_encoder.config_dict()) else {}
    text = dtypes["text_encoder"]
    tensors |= {name: stored_tensor(name, tensor, text) for name, tensor in spare.items()}
    metadata = modelspec(components, title or target.stem)
    metadata[CONFIGURATION] = json.dumps(configuration(components), ensure_ascii=False)
    _write(tensors, target, metadata)
    return target


def check_target(target: Path) -> None:
    """Refuse a name that a file cannot have. Raises: UserError."""
    if target.suffix.lower() != ENDING:
        raise UserError(
            f"a single file is written as {ENDING}; got {target.name}. Pickles are only read."
        )
    if target.is_dir():
        raise UserError(f"cannot write a file to {target}: it is a folder.")


def layout_of(components: Components) -> tuple[dict[str, dict[str, Tensor]], Layout]:
    """The weights of each part, and where they go."""
    vae, text = components.autoencoder, components.text_encoder
    states: dict[str, dict[str, Tensor]] = {
        "unet": dict(components.unet.state_dict()),
        "vae": dict(vae.module.state_dict()),
        "text_encoder": dict(text.module.state_dict()),
    }
    config = components.unet.config
    return states, compvis_layout(config, vae.config_dict(), text.config_dict(), states)


def configuration(components: Components) -> dict[str, Any]:
    """The model's configuration files, by the names of their folders."""
    sampling = components.sampling
    return {
        "unet": components.unet.config_dict(),
        "vae": components.autoencoder.config_dict(),
        "text_encoder": components.text_encoder.config_dict(),
        "scheduler": write_scheduler(components.schedule, components.prediction, sampling),
        "tokenizer": describe_tokenizer(components.text_encoder.tokenizer),
        "generation": generation_defaults(sampling),
    }


def modelspec(components: Components, title: str) -> dict[str, str]:
    """Metadata after github.com/Stability-AI/ModelSpec, version 1.0.0."""
    version, words = sd_version(components), {ours: word for word, ours in MODELSPEC_WORDS.items()}
    size = components.unet.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    scale = components.autoencoder.downscale
    prediction = components.prediction
    names = {"1": "stable-diffusion-v1", "2": "stable-diffusion-v2-512"}
    if (version, prediction) == ("2", "v"):
        names["2"] = "stable-diffusion-v2-768-v"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": names.get(version or "", "latentdiff"),
        "modelspec.implementation": _CODE.get(version or "", "latentdiff"),
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "modelspec.resolution": f"{width * scale}x{height * scale}",
        "modelspec.prediction_type": words.get(prediction, prediction),
        "modelspec.hash_sha256": _NO_HASH,
    }


def _write(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, temporary, metadata)
        _put_hash(temporary)
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _put_hash(file: Path) -> None:
    """Fill in the hash of everything behind the header, which ModelSpec has in the header."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)
        digest = hashlib.sha256()
        while chunk := opened.read(2**24):
            digest.update(chunk)
        opened.seek(8 + header.index(_NO_HASH.encode()))
        opened.write(f"0x{digest.hexdigest()}".encode())
