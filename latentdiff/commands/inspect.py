"""Say what a file or folder of weights is, without building any network.

    latentdiff inspect FILE [--keys]

FILE is a single-file checkpoint, a LoRA, a textual inversion, one part of a model, or a folder
that holds a model or one of these.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.commands.inspect_adapters import (
    adapter_in,
    beside,
    lora_rows,
    usable,
    word_rows,
)
from latentdiff.commands.keys import grouped, joined, size
from latentdiff.embedded import named
from latentdiff.errors import UserError, command

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.tensor_file import TensorFile

#: Beginnings of metadata that record a training: kohya's trainer, ours, diffusers' LoRA.
_RECORDS = ("ss_", "latentdiff.", "lora_adapter_metadata")
_LONG = 200


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "latentdiff inspect", description=__doc__, formatter_class=form
    )
    parser.add_argument("file", metavar="FILE", help="file or folder; `embedded` is the package's")
    parser.add_argument("--keys", action="store_true", help="list every key, its shape and dtype")
    return parser.parse_args(arguments)


def inspect(path: Path, keys: bool = False) -> list[tuple[str, str]]:
    """What a file or folder is, as (name, value) rows; a row without a name goes on.

    Raises:  UserError: it does not exist or cannot be read.
    """
    path = path.expanduser()
    from latentdiff.tensor_file import read_tensor_file

    if path.is_dir():
        if inner := adapter_in(path):
            first, *others = _file(read_tensor_file(inner), keys)
            return [first, *beside(inner), *others]
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    return _file(read_tensor_file(path), keys)


def _file(file: TensorFile, keys: bool) -> list[tuple[str, str]]:
    from latentdiff.formats.identify import identify

    shapes = {name: tuple(t.shape) for name, t in file.tensors.items()}
    identity = identify(shapes, file.metadata)
    if identity.kind != "model":
        opens = usable(file, identity)
    elif identity.is_supported:
        opens = "opens here"
    else:
        opens = "does not open as a text-to-image model"
    rows = [("file", f"{file.path}  ({size(file.path.stat().st_size)})")]
    rows += [("what", f"{identity.name}; {opens}"), *_amounts(file.tensors)]
    if identity.kind == "adapter":
        rows += lora_rows(file)
    elif identity.kind == "word":
        rows += word_rows(file)
    elif identity.is_supported:
        rows += _checkpoint(file, str(identity.version))
    rows += _record(file)
    rows += [("keys" if i == 0 else "", line) for i, line in enumerate(_keys(file.tensors, keys))]
    return rows


def _amounts(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    ordered = sorted(counts, key=lambda kind: -counts[kind])
    kinds = joined([f"{kind} ({counts[kind]:,} numbers)" for kind in ordered])
    return [("tensors", str(len(tensors))), ("dtype", kinds or "none")]


def _checkpoint(file: TensorFile, version: str) -> list[tuple[str, str]]:
    from latentdiff.formats.identify import CONFIGURATION
    from latentdiff.formats.stated import has_zero_snr, stated_prediction

    said = stated_prediction(file)
    if version == "own":
        scheduler = _json(file.metadata[CONFIGURATION]).get("scheduler", {})
        return [("prediction", _prediction(scheduler))]
    unsaid = {"1": "eps (version 1, and the file says nothing else)"}
    text = said or unsaid.get(version, "not said by the file; measured when it is opened")
    rows = [("prediction", text + (", zero terminal SNR" if has_zero_snr(file) else ""))]
    if any(key.startswith("model_ema.diffusion_model") for key in file.tensors):
        rows.append(("averages", "there, and taken; --variant non_ema takes the newest weights"))
    return rows


def _record(file: TensorFile) -> list[tuple[str, str]]:
    """What is said about the training, and the fields for people."""
    from latentdiff.formats.identify import CONFIGURATION

    rows = [(name.removeprefix("modelspec."), text) for name, text in file.metadata.items()
            if name.startswith("modelspec.")]  # fmt: skip
    record = {
        k: v for k, v in file.metadata.items() if k.startswith(_RECORDS) and k != CONFIGURATION
    }
    record |= {k: str(v) for k, v in file.facts.items()}
    rows += [(name, _short(text)) for name, text in sorted(record.items())]
    return rows if record else [*rows, ("training record", "none")]


def _keys(tensors: Mapping[str, Tensor], every: bool) -> list[str]:
    if not every:
        return grouped(sorted(tensors), few=2)
    return [
        f"{name}  {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for name, t in sorted(tensors.items())
    ]


def _folder(folder: Path) -> list[tuple[str, str]]:
    from latentdiff.formats.diffusers_folder import PARTS, check_layout
    from latentdiff.weight_files import TEXT_STEM, UNET_STEM, read_weights

    _refuse_without_weights(folder, PARTS)
    check_layout(folder)
    scheduler = _json((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    unet = _json((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    rows = [
        ("folder", f"{folder}  ({size(_bytes(folder))})"),
        ("what", f"a text-to-image model in the diffusers layout: {joined(PARTS)}"),
        ("prediction", _prediction(scheduler)),
        ("context", f"{unet.get('cross_attention_dim')} channels of text states"),
    ]
    for part, stem in (("unet", UNET_STEM), ("vae", UNET_STEM), ("text_encoder", TEXT_STEM)):
        tensors = read_weights(folder / part, stem)
        rows += [(part, joined([text for _, text in reversed(_amounts(tensors))]) + " tensors")]
    return rows


def _refuse_without_weights(folder: Path, parts: Sequence[str]) -> None:
    """Say what a folder could hold, where it holds nothing of the kind. Raises: UserError."""
    from latentdiff.formats import embedding_file, lora_files
    from latentdiff.formats.diffusers_folder import run_hint

    if not any((folder / name).exists() for name in (*parts, "model_index.json")):
        raise UserError(
            f"{folder} holds no model ({joined(parts)}), no LoRA ({lora_files.FILE}) and no "
            f"textual inversion ({embedding_file.FILE}). Name such a folder, or a file in it."
            f"{run_hint(folder)}"
        )


def _prediction(scheduler: Mapping[str, Any]) -> str:
    snr = ", zero terminal SNR" if scheduler.get("rescale_betas_zero_snr") else ""
    return f"{scheduler.get('prediction_type', 'epsilon')}{snr}"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"a configuration is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _short(text: str) -> str:
    text = " ".join(text.split())  # indented JSON would fill the screen
    return text if len(text) <= _LONG else f"{text[:_LONG]} … ({len(text):,} characters)"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `errors.command` for exit codes."""
    args = parse(arguments)
    rows = inspect(Path(named(args.file)), args.keys)
    width = max(len(name) for name, _ in rows) + 2
    print("\n".join(f"{name:{width}}{text}" for name, text in rows))
