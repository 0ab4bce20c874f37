"""Say what a file or folder of weights is, without building any network.

    latentdiff inspect FILE [--keys]

FILE is a single-file checkpoint, a LoRA, a textual inversion, one part of a model, a folder that
holds a model or one of these, or the hub id of a model, which is downloaded into the usual cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from latentdiff.errors import UserError, command, printable

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
    parser.add_argument("file", metavar="FILE", help="file, folder or hub id")
    parser.add_argument("--keys", action="store_true", help="list every key, its shape and dtype")
    return parser.parse_args(arguments)


def inspect(name: str, keys: bool = False) -> list[tuple[str, str]]:
    """What a file, folder or hub id is, as (name, value) rows; a row without a name goes on.

    Raises:  UserError: it does not exist or cannot be read.
    """
    from latentdiff.formats.hub import resolve_folder
    from latentdiff.formats.model import as_file
    from latentdiff.tensor_file import read_tensor_file

    if file := as_file(name):
        return _file(read_tensor_file(file), keys)
    folder = resolve_folder(named(name))
    if inner := adapter_in(folder):
        first, *others = _file(read_tensor_file(inner), keys)
        return [first, *beside(inner), *others]
    return _folder(folder)


def _file(file: TensorFile, keys: bool) -> list[tuple[str, str]]:
    from latentdiff.formats.identify import identify
    from latentdiff.formats.single_file import check_single_file

    shapes = {name: tuple(t.shape) for name, t in file.tensors.items()}
    identity = identify(shapes, file.metadata)
    why_not = None
    if identity.kind != "model":
        opens = usable(file, identity)
    elif identity.is_supported:
        why_not = _why_not(check_single_file, file)
        opens = f"does not open: {why_not}" if why_not else "opens here"
    else:
        opens = "does not open as a text-to-image model"
    rows = [("file", f"{file.path}  ({size(file.path.stat().st_size)})")]
    rows += [("what", f"{identity.name}; {opens}"), *_amounts(file.tensors)]
    if identity.kind == "adapter":
        rows += lora_rows(file)
    elif identity.kind == "word":
        rows += word_rows(file)
    elif identity.is_supported and not why_not:
        rows += _checkpoint(file, str(identity.version))
    rows += _record(file)
    rows += [("keys" if i == 0 else "", line) for i, line in enumerate(_keys(file.tensors, keys))]
    return rows


def _why_not(opening: Callable[[Any], object], what: Any) -> str | None:
    try:
        opening(what)
    except UserError as error:
        return " ".join(str(error).split())
    return None


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
    from latentdiff.formats.inference_yaml import yaml_beside
    from latentdiff.formats.stated import has_zero_snr, stated_prediction
    from latentdiff.json_text import parse_json

    if version == "own":
        scheduler = parse_json(file.metadata[CONFIGURATION], file.path)["scheduler"]
        return [("prediction", _prediction(scheduler))]
    said = stated_prediction(file, yaml_beside(file.path))
    unsaid = {"1": "eps (version 1, and the file says nothing else)"}
    text = said or unsaid.get(version, "not said by the file; measured when it is opened")
    rows = [("prediction", text + (", zero terminal SNR" if has_zero_snr(file) else ""))]
    if any(key.startswith("model_ema.diffusion_model") for key in file.tensors):
        rows.append(("averages", "there, and taken; --variant non_ema takes the newest weights"))
    return rows


def _record(file: TensorFile) -> list[tuple[str, str]]:
    """What is said about the training, and the fields for people."""
    from latentdiff.formats.identify import CONFIGURATION

    rows = [
        (_short(name.removeprefix("modelspec.")), _short(text))
        for name, text in file.metadata.items()
        if name.startswith("modelspec.")
    ]
    record = {
        k: v for k, v in file.metadata.items() if k.startswith(_RECORDS) and k != CONFIGURATION
    }
    record |= {k: str(v) for k, v in file.facts.items()}
    rows += [(_short(name), _short(text)) for name, text in sorted(record.items())]
    return rows if record else [*rows, ("training record", "none")]


def _keys(tensors: Mapping[str, Tensor], every: bool) -> list[str]:
    if not every:
        return grouped(sorted(tensors), few=2)
    return [
        f"{name}  {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
        for name, t in sorted(tensors.items())
    ]


def _folder(folder: Path) -> list[tuple[str, str]]:
    from latentdiff.formats.diffusers_folder import PARTS, check_layout, load_components
    from latentdiff.json_text import read_json
    from latentdiff.weight_files import TEXT_STEM, UNET_STEM, read_weights

    _refuse_without_weights(folder, PARTS)
    check_layout(folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    unet = read_json(folder / "unet" / "config.json")
    why_not = _why_not(partial(load_components, dtype=None), folder)
    opens = f"does not open: {why_not}" if why_not else "opens here"
    rows = [
        ("folder", f"{folder}  ({size(_bytes(folder))})"),
        ("what", f"a text-to-image model in the diffusers layout: {joined(PARTS)}; {opens}"),
        ("prediction", _short(_prediction(scheduler))),
        ("context", _short(f"{unet.get('cross_attention_dim')} channels of text states")),
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


def _short(text: str) -> str:
    text = " ".join(text.split())  # indented JSON would fill the screen
    return text if len(text) <= _LONG else f"{text[:_LONG]} … ({len(text):,} characters)"


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `errors.command` for exit codes."""
    args = parse(arguments)
    rows = inspect(args.file, args.keys)
    width = max(len(name) for name, _ in rows) + 2
    print("\n".join(printable(f"{name:{width}}{text}") for name, text in rows))
