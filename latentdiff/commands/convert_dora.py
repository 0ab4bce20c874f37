"""`latentdiff convert MODEL PLAIN.safetensors --lora DORA --rank R`: a DoRA as a plain LoRA.

A DoRA's change has no small rank, since every output channel of the weight has a factor of its own.
The plain LoRA holds its R largest singular values; how much is missing is measured and said.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError

if TYPE_CHECKING:
    import torch

    from latentdiff.formats.components import Components


def check_dora(loras: list[str], target: Path, rank: int) -> None:
    """Refuse options that do not go together, before a model is read. Raises: UserError."""
    if rank < 1:
        raise UserError(f"--rank must be at least 1; got {rank}.")
    if len(loras) != 1:
        raise UserError(f"--rank writes one --lora as a plain LoRA; got {len(loras)} of them.")
    if target.suffix.lower() != ".safetensors":
        raise UserError(f"a LoRA is written as .safetensors; got {target}.")


def convert_dora(
    components: Components, lora: str, target: Path, rank: int, dtype: torch.dtype | None
) -> str:
    """Write the plain LoRA that is nearest to a DoRA on a model, in kohya's layout.

    Args:    dtype: on disk; None: as the DoRA's matrices are.
    Returns: what was written, and its relative error ‖ΔW − ΔW_R‖ / ‖ΔW‖, as the file has it.
    Raises:  UserError: no DoRA, not for this model, or the target cannot be written.
    """
    from latentdiff.formats.lora_files import read_lora, write_lora
    from latentdiff.models.low_rank import layers_of, nearest
    from latentdiff.pipelines.lora import match, parts_of

    parts = parts_of(components)
    changes = match(read_lora(lora), parts)
    if all(change.magnitude is None for change in changes.values()):
        raise UserError(f"{lora} is a plain LoRA already; --rank is for a DoRA.")
    plain, missing, whole, worst = {}, 0.0, 0.0, (0.0, "")
    for (part, module), change in changes.items():
        name, weight = f"{part}.{module}", layers_of(parts[part])[module].weight
        delta = change.delta(weight)
        near = change if change.magnitude is None else nearest(delta, rank)
        kind = dtype or change.down.dtype
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
