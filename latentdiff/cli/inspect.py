"""Say what a file or folder of weights is, without building any network, or how an image was made.

    latentdiff inspect FILE [--keys]

FILE is a single-file checkpoint, a LoRA, a textual inversion, one part of a model, a folder that
holds a model or one of these, the hub id of a model, which is downloaded into the usual cache, or
an image.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, command, printable

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.formats.identify import Identity
    from latentdiff.tensor_file import TensorFile

#: kohya's names have _ for every dot of the layer's: up to the block's number.
_FLAT = re.compile(
    r"(lora_(?:unet|te\d?)_(?:(?:down|up|input|output|double|single)_blocks_\d+|mid_block|"
    r"middle_block|text_model_encoder_layers)_)."
)


def grouped(keys: Iterable[str], few: int = 4) -> list[str]:
    """Keys one a line; those that share their first words are counted where they are many."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(_start(key), []).append(key)
    lines: list[str] = []
    for start, members in groups.items():
        lines += members if len(members) <= few else [f"{start}…  ({len(members)} keys)"]
    return lines


def _start(key: str) -> str:
    """What a group of keys has in common: two words, or the part and block of kohya's names."""
    if flat := _FLAT.match(key):
        return flat[1]
    words = 4 if key.startswith("base_model.model.") else 2
    return ".".join(key.split(".")[:words]) + "."


def size(count: int) -> str:
    """Bytes for people: 3.44 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} bytes"


def joined(words: Sequence[object]) -> str:
    """Values with commas between."""
    return ", ".join(map(str, words))


Rows = list[tuple[str, str]]


def adapter_in(folder: Path) -> Path | None:
    """The LoRA or learned word that a folder holds in place of a model; None: it holds none.

    The usual names first; otherwise the one safetensors file, if there is only one.
    """
    from latentdiff.formats import embedding as embedding_file
    from latentdiff.formats import lora as lora_files
    from latentdiff.formats.folder import PARTS
    from latentdiff.tensor_file import usual_file

    if any((folder / part).is_dir() for part in PARTS) or (folder / "model_index.json").is_file():
        return None
    return usual_file(folder, (*lora_files.USUAL, embedding_file.FILE, embedding_file.PICKLE))


def beside(file: Path) -> Rows:
    """The other files of weights in the folder, by name, for example the other layout's."""
    from latentdiff.tensor_file import ENDINGS

    others = [f for f in sorted(file.parent.iterdir()) if f.suffix.lower() in ENDINGS and f != file]
    names = joined([f"{f.name} ({size(f.stat().st_size)})" for f in others])
    return [("beside it", names)] if others else []


def usable(file: TensorFile, identity: Identity) -> str:
    """Whether and how a LoRA or learned word can be used here; why not, if it cannot."""
    from latentdiff.formats.embedding import read_embedding
    from latentdiff.formats.lora import read_lora

    try:
        if identity.kind == "word":
            read_embedding(file.path)
            return "used beside a model, with --embedding FILE"
        read_lora(file.path)
    except UserError as error:
        return str(error).removeprefix(f"{file.path} ")
    return "used beside a model, with --lora FILE"


def word_rows(file: TensorFile) -> Rows:
    """The word of a textual inversion, its vectors, and which model they are for."""
    from latentdiff.formats.embedding import read_embedding
    from latentdiff.formats.lora import BASES

    try:
        word = read_embedding(file.path)
    except UserError:  # what is wrong with it stands in the line that says what it is
        return []
    count, width = word.vectors.shape
    return [
        ("word", word.token),
        ("vectors", f"{count} of {width} numbers"),
        ("made for", BASES.get(width, f"a text encoder of width {width}")),
    ]


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
    from latentdiff.data.images import IMAGE_ENDINGS
    from latentdiff.formats.hub import resolve_folder
    from latentdiff.formats.model import as_file
    from latentdiff.tensor_file import read_tensor_file

    if file := as_file(name):
        if file.suffix.lower() in IMAGE_ENDINGS:
            return image_rows(file)
        return _file(read_tensor_file(file), keys)
    folder = resolve_folder(name)
    if inner := adapter_in(folder):
        first, *others = _file(read_tensor_file(inner), keys)
        return [first, *beside(inner), *others]
    return _folder(folder)


def image_rows(file: Path) -> Rows:
    """How an image was made, as its file says."""
    from latentdiff.pipelines.metadata import read

    record = read(file)
    rows = [("made by", record.program or "it does not say")]
    for name, value in record.settings.items():
        if name == "images":
            value = [one.get("seed", record.settings["seed"]) for one in value]
            name = "seeds"
        if value not in (None, [], {}, ""):
            rows.append((name, value if isinstance(value, str) else json.dumps(value)))
    if record.edited:
        rows.append(("edited", f"the text beside it, in {joined(record.edited)}"))
    again = f"no: {record.why_not}" if record.why_not else "latentdiff generate --replay FILE"
    return [*rows, ("made again", again)]


def _file(file: TensorFile, keys: bool) -> list[tuple[str, str]]:
    from latentdiff.formats.identify import identify
    from latentdiff.formats.lora import lora_rows
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
    from latentdiff.files import parse_json
    from latentdiff.formats.identify import CONFIGURATION
    from latentdiff.formats.sd_facts import has_zero_snr, stated_prediction, yaml_beside

    if version == "own":
        scheduler = parse_json(file.metadata[CONFIGURATION], file.path)["scheduler"]
        return [("prediction", _prediction(scheduler))]
    stated = stated_prediction(file, yaml_beside(file.path))
    unsaid = {"1": "eps (version 1, and the file says nothing else)"}
    text = stated or unsaid.get(version, "not stated by the file; measured when it is opened")
    rows = [("prediction", text + (", zero terminal SNR" if has_zero_snr(file) else ""))]
    if any(key.startswith("model_ema.diffusion_model") for key in file.tensors):
        rows.append(("averages", "there, and taken; --variant non_ema takes the newest weights"))
    return rows


def _record(file: TensorFile) -> list[tuple[str, str]]:
    """What is stated about the training, and the fields for people."""
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
    from latentdiff.files import read_json
    from latentdiff.formats.folder import PARTS, check_layout, load_components
    from latentdiff.weights import TEXT_STEM, UNET_STEM, read_weights

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
    from latentdiff.formats import embedding as embedding_file
    from latentdiff.formats import lora as lora_files
    from latentdiff.formats.folder import run_hint

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
