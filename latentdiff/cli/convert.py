"""Turn a model into a diffusers folder, or into a single .safetensors file.

    latentdiff convert SOURCE TARGET [--dtype float16] [--variant fp16] [--prediction v]
    latentdiff convert SOURCE TARGET --lora FILE[:WEIGHT]
    latentdiff convert SOURCE PLAIN.safetensors --lora DORA --rank 32

SOURCE is a folder, a single file (.safetensors or .ckpt) or a hub id; a TARGET that ends in
.safetensors becomes a single file in CompVis' layout, any other a folder. Weights keep the dtype
they have on disk unless --dtype says otherwise. Nothing is written before all of SOURCE is read.

With --lora the changes of LoRA files are added to the weights. With --rank no model is written but
a plain LoRA, which comes as near to a DoRA, LoHa or LoKr on this model as its rank allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError, command, printable, some

if TYPE_CHECKING:
    import torch

    from latentdiff.formats.folder import Components


def check_adapter(loras: list[str], target: Path, rank: int) -> None:
    """Refuse options that do not go together, before a model is read. Raises: UserError."""
    if rank < 1:
        raise UserError(f"--rank must be at least 1; got {rank}.")
    if len(loras) != 1:
        raise UserError(f"--rank writes one --lora as a plain LoRA; got {len(loras)} of them.")
    if target.suffix.lower() != ".safetensors":
        raise UserError(f"a LoRA is written as .safetensors; got {target}.")


def convert_adapter(
    components: Components, lora: str, target: Path, rank: int, dtype: torch.dtype | None
) -> str:
    """Write the plain LoRA that is nearest to a DoRA, LoHa or LoKr on a model, in kohya's layout.

    Their changes have no small rank; the plain LoRA holds the largest singular values.

    Args:    dtype: on disk; None: as the file's matrices are.
    Returns: what was written, and its relative error ‖ΔW − ΔW_R‖ / ‖ΔW‖, as the file has it.
    Raises:  UserError: none of them, not for this model, or the target cannot be written.
    """
    from latentdiff.formats.lora import read_lora, write_lora
    from latentdiff.models.low_rank import LowRank, layers_of, nearest
    from latentdiff.pipelines.lora import match, parts_of

    parts = parts_of(components)
    changes, whole_changes = match(read_lora(lora), parts)
    ready = {
        place: change
        for place, change in changes.items()
        if isinstance(change, LowRank) and change.magnitude is None
    }
    if whole_changes or len(ready) == len(changes):
        raise UserError(
            f"{lora} is no DoRA, LoHa or LoKr, or more than that; --rank is for these alone."
        )
    plain, missing, whole, worst = {}, 0.0, 0.0, (0.0, "")
    for (part, module), change in changes.items():
        name, weight = f"{part}.{module}", layers_of(parts[part])[module].weight
        delta = change.delta(weight)
        near = ready.get((part, module)) or nearest(delta, rank)
        kind = dtype or change.dtype
        near = replace(near, down=near.down.to(kind), up=near.up.to(kind))
        off, size = float((delta - near.delta(weight)).square().sum()), float(delta.square().sum())
        missing, whole = missing + off, whole + size
        worst = max(worst, ((off / size) ** 0.5 if size else 0.0, name))
        plain[name] = near
    write_lora(target, plain, "kohya")
    return (
        f"wrote {target}: a plain LoRA of rank {rank}\n"
        f"relative error of the change: {(missing / whole) ** 0.5 if whole else 0.0:.3g} over "
        f"{len(plain)} layers; at most {worst[0]:.3g}, of {worst[1]}"
    )


DTYPES = ("float32", "float16", "bfloat16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "latentdiff convert", description=__doc__, formatter_class=form
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder, single file or hub id")
    add("target", metavar="TARGET", type=Path, help="new folder, or a name ending in .safetensors")
    add("--dtype", choices=DTYPES, help="of the weights on disk; default: as they are")
    add("--variant", help="which weights of SOURCE: fp16 or non_ema of a folder, non_ema of a file")
    add("--revision", help="branch, tag or commit of a hub id")
    add("--prediction", choices=("eps", "v"), help="instead of what SOURCE says")
    add("--title", help="shown by programs that open a single file; default: its name")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be repeated")
    add(
        "--rank",
        type=int,
        metavar="R",
        help="write the one --lora (DoRA, LoHa, LoKr) as a plain LoRA",
    )
    add("--overwrite", action="store_true", help="replace TARGET if it is there")
    return parser.parse_args(arguments)


def convert(args: argparse.Namespace) -> str:
    """Read all, then write all. Returns: what to say of it. Raises: UserError."""
    target: Path = args.target.expanduser()
    _check(args.source, target, args.overwrite)
    if args.rank is not None:
        check_adapter(args.lora, target, args.rank)
    import torch

    from latentdiff.formats.folder import save_components
    from latentdiff.formats.model import load_model
    from latentdiff.formats.single_file import ENDING, check_target, save_single_file

    single = target.suffix.lower() == ENDING
    if single:
        check_target(target)
    options = {"variant": args.variant, "revision": args.revision, "prediction": args.prediction}
    components = load_model(args.source, dtype=None, **options)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if args.rank is not None:
        return convert_adapter(components, args.lora[0], target, args.rank, dtype)
    _fuse(components, args.lora)
    if single:
        return report(save_single_file(target, components, dtype, title=args.title), components)
    return report(save_components(target, components, dtype), components)


def _fuse(components: Components, files: Sequence[str]) -> None:
    """Add the changes of LoRA files to the weights. Raises: UserError."""
    from latentdiff.pipelines.lora import Loras, lora_and_weight, parts_of

    loras = Loras(parts_of(components))
    for text in files:
        loras.load(*lora_and_weight(text))
    loras.fuse()


def _check(source: str, target: Path, overwrite: bool) -> None:
    if target.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"TARGET is a folder or ends in .safetensors; got {target}.")
    if target.exists() and (own := Path(source).expanduser()).exists() and target.samefile(own):
        raise UserError(f"SOURCE and TARGET are the same: {target}.")
    filled = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if filled and not overwrite:
        raise UserError(f"{target} exists. Choose another name, or add --overwrite.")


def report(written: Path, components: Components) -> str:
    """Say what was written and what was left out."""
    from latentdiff.cli.inspect import grouped
    from latentdiff.formats.single_file import ENDING, sd_differences, sd_version

    lines, single = [f"wrote {written}"], written.suffix.lower() == ENDING
    if dropped := [*components.dropped, *(() if single else components.spare)]:
        lines.append(f"left out {len(dropped)} keys that no part has a use for:")
        lines += [f"  {line}" for line in grouped(dropped)]
    differences = sd_differences(components) if single else {}
    if single and not differences and sd_version(components) == "2" and not components.spare:
        lines.append(
            "note: the file has the 23 text layers that Stable Diffusion 2 uses, as SOURCE has. "
            "Programs that build all 24 of OpenCLIP name the others as missing when they open it "
            "(ComfyUI: 'clip missing'), and draw the same."
        )
    if differences:
        lines.append(
            "note: not of Stable Diffusion's size. Its configuration is in the metadata, so "
            "it opens here; programs that take sizes from the keys alone will not open it."
        )
        lines += [f"  {part}: {some(texts, 3)}" for part, texts in differences.items()]
    return "\n".join(map(printable, lines))


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see `errors.command` for exit codes."""
    print(convert(parse(arguments)))
