"""What `latentdiff inspect` says of LoRAs and learned words, and which one a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.commands.keys import joined, size
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.formats.identify import Identity
    from latentdiff.tensor_file import TensorFile

Rows = list[tuple[str, str]]


def adapter_in(folder: Path) -> Path | None:
    """The LoRA or learned word that a folder holds in place of a model; None: it holds none.

    The usual names first; otherwise the one safetensors file, if there is only one.
    """
    from latentdiff.formats import embedding_file, lora_files
    from latentdiff.formats.diffusers_folder import PARTS

    if any((folder / part).is_dir() for part in PARTS) or (folder / "model_index.json").is_file():
        return None
    usual = (*lora_files.USUAL, embedding_file.FILE, embedding_file.PICKLE)
    if found := next((folder / name for name in usual if (folder / name).is_file()), None):
        return found
    others = sorted(folder.glob("*.safetensors"))
    return others[0] if len(others) == 1 else None


def beside(file: Path) -> Rows:
    """The other files of weights in the folder, by name, for example the other layout's."""
    from latentdiff.weight_formats import PICKLES

    endings = (".safetensors", *PICKLES)
    others = [f for f in sorted(file.parent.iterdir()) if f.suffix.lower() in endings and f != file]
    names = joined([f"{f.name} ({size(f.stat().st_size)})" for f in others])
    return [("beside it", names)] if others else []


def usable(file: TensorFile, identity: Identity) -> str:
    """Whether and how a LoRA or learned word can be used here; why not, if it cannot."""
    from latentdiff.formats.embedding_file import read_embedding
    from latentdiff.formats.lora_files import read_lora

    try:
        if identity.kind == "word":
            read_embedding(file.path)
            return "used beside a model, with --embedding FILE"
        read_lora(file.path)
    except UserError as error:
        return str(error).removeprefix(f"{file.path} ")
    return "used beside a model, with --lora FILE"


def lora_rows(file: TensorFile) -> Rows:
    """Layout, ranks, scale, what is changed and for which model."""
    from latentdiff.formats.lora_facts import lora_facts

    found = lora_facts(file)
    targets = joined([f"{count} layers of the {part}" for part, count in found.targets.items()])
    said = joined(list(dict.fromkeys(f"{a:g}" for a in found.alphas)))
    unsaid = found.without_alpha
    if not said:
        said = "not said in the file, which means alpha = rank"
    elif unsaid:
        said += f"; {unsaid} layers say none, which means alpha = rank"
    said += ", over the root of the rank (rank-stabilised)" if found.stabilised else ""
    left = [("left out", f"learned words: {joined(found.bundled)}")] if found.bundled else []
    return [
        ("layout", found.layout + (" (DoRA)" if found.dora else "")),
        ("rank", joined(found.ranks) or "not found"),
        ("alpha", said),
        ("changes", targets or "nothing known"),
        ("made for", found.base or "unknown: it does not touch what reads the text"),
        *left,
    ]


def word_rows(file: TensorFile) -> Rows:
    """The word of a textual inversion, its vectors, and which model they are for."""
    from latentdiff.formats.embedding_file import read_embedding
    from latentdiff.formats.lora_facts import BASES

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
