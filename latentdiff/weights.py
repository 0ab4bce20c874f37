"""The weights of one component: finding, reading, filling a network, checking, writing.

They are whole or in shards:

STEM.safetensors           or STEM-00001-of-0000N.safetensors … with STEM.safetensors.index.json
STEM.VARIANT.safetensors   the same of a variant: fp16, non_ema
STEM.bin …                 the same as pickles (pytorch_model for `model`), never run as code
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError, some
from latentdiff.files import read_json, write_json
from latentdiff.tensor_file import read_tensor_file


def refuse_not_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises: UserError: naming a tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        # Tensors of eight bits have no isfinite.
        if not (tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all():
            raise UserError(
                f"{where} cannot be used: {name} has numbers that are not finite (NaN or "
                "infinity). The training that wrote it diverged, or its 16 bits overflowed."
            )


UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
#: What transformers calls the pickle of what it calls `model` as safetensors.
_PICKLE_STEM = {TEXT_STEM: "pytorch_model"}
#: Variants that are read unasked, when nothing else is there.
STAND_INS = ("fp16", "bf16")
#: Weights that stay float32 in a 16-bit file: frequencies, where rounding changes whole turns.
KEEP_FLOAT32 = ("time_proj.weight",)


def read_weights(
    folder: Path, stem: str, variant: str | None = None, *, insist: bool = False
) -> dict[str, Tensor]:
    """Read a component's state dict, in the dtype that is on disk.

    Args:    variant: fp16, non_ema, …; None: the plain files, or the half-precision ones where
             there are no others.
             insist: do not take the plain files where the variant is missing.
    Raises:  UserError: no such weights, a missing shard, or a file that cannot be read.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(folder, stem, variant, insist=insist):
        state |= read_tensor_file(file).tensors
    return _without_wrappers(state)


def weight_files(
    folder: Path, stem: str, variant: str | None = None, *, insist: bool = False
) -> list[Path]:
    """The files that `read_weights` reads. Raises: UserError: there are none."""
    tried = [variant] if variant and insist else [variant, None, *STAND_INS]
    for name in dict.fromkeys(tried):
        if files := _find(folder, stem, name):
            return files
    raise UserError(_no_weights(folder, stem, variant))


def _find(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files that together hold a variant of the weights; empty when it is not there."""
    dot = f".{variant}" if variant else ""
    for name, ending in ((stem, "safetensors"), (_PICKLE_STEM.get(stem, stem), "bin")):
        whole = folder / f"{name}{dot}.{ending}"
        if whole.is_file():
            return [whole]
        # The second is what diffusers wrote before 0.30.
        for index in (f"{name}.{ending}.index{dot}.json", f"{name}.{ending}{dot}.index.json"):
            if (folder / index).is_file():
                return _shard_files(folder / index)
    return []


def _shard_files(index: Path) -> list[Path]:
    try:
        placed = read_json(index)["weight_map"]
        files = [index.parent / name for name in sorted(set(placed.values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of shards: {error!r}") from error
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise UserError(f"{index} names {file.name}, which is not in {index.parent}.")
    return files


def _no_weights(folder: Path, stem: str, variant: str | None) -> str:
    present = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin"))
    expected = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
    whole = (re.fullmatch(rf"{stem}\.(.+)\.(safetensors|bin)", name) for name in present)
    variants = list(dict.fromkeys(match[1] for match in whole if match))
    hint = f" Name the variant: {', '.join(variants)} (--variant, or variant=)." if variants else ""
    return (
        f"no weights in {folder}: expected {expected} (or shards with an index, or .bin); "
        f"there is {', '.join(present) or 'none'}.{hint}"
    )


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what torch.compile and data-parallel training put before every name."""
    for wrapper in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    where: str | Path,
    dtype: torch.dtype | None,
    *,
    useless: Collection[str] = (),
) -> list[str]:
    """Put the tensors of a file into a network built on the meta device, without copying them.

    Args:    where: the file or folder, for the message.
             dtype: of the weights in memory, `KEEP_FLOAT32` excepted; None: as they are.
             useless: names that files of this kind may hold although the network has no use for
             them.
    Returns: those of `useless` that were there.
    Raises:  UserError: a weight is missing, unexpected, of another shape or not of real numbers.
    """
    wanted = module.state_dict()
    found = {name: state[name] for name in wanted if name in state}
    refuse_misfit(
        where,
        {
            "missing": [name for name in wanted if name not in found],
            "unexpected": [name for name in state if name not in wanted and name not in useless],
            "of another shape": [n for n, t in found.items() if t.shape != wanted[n].shape],
            "not of real numbers": [n for n, t in found.items() if not t.is_floating_point()],
        },
    )
    cast = {
        name: tensor if dtype is None or name.endswith(KEEP_FLOAT32) else tensor.to(dtype)
        for name, tensor in found.items()
    }
    module.load_state_dict(cast, assign=True)
    return [name for name in state if name not in wanted]


def refuse_misfit(where: str | Path, kinds: Mapping[str, Sequence[str]]) -> None:
    """Name weights that do not fit.

    Args:   kinds: how they do not fit → their names.
    Raises: UserError: unless there are none.
    """
    found = [
        f"{len(names)} {kind}: {some(sorted(names), 6)}" for kind, names in kinds.items() if names
    ]
    if found:
        raise UserError(
            f"the weights in {where} do not fit its configuration; {'; '.join(found)}. "
            "Nothing was loaded."
        )


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type that most of a state dict's numbers have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def write_weights(
    folder: Path,
    stem: str,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a component's state dict.

    Args:    dtype: of the floating-point weights on disk, `KEEP_FLOAT32` excepted.
             max_shard_bytes: split into files of at most this size (a single larger tensor gets
             its own); None: one file.
    """
    tensors = {name: stored_tensor(name, tensor, dtype) for name, tensor in state.items()}
    shards, filled = [dict[str, Tensor]()], 0
    for name, tensor in tensors.items():
        if max_shard_bytes is not None and shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_tensors(tensors, folder / f"{stem}.safetensors")
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file)
        placed |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)


def stored_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as it is written in files of a dtype."""
    keep = name.endswith(KEEP_FLOAT32) or not tensor.is_floating_point()
    return tensor.detach().to("cpu", tensor.dtype if keep else dtype).contiguous()


def refuse_overflow(tensors: Mapping[str, Tensor]) -> None:
    """Look at weights in the number format of a file before they are written.

    Raises: UserError: one of them holds NaN, or values that the format has no room for.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.isfinite().all():
            continue
        kind = str(tensor.dtype).removeprefix("torch.")
        if bool(tensor.isnan().any()):
            raise UserError(
                f"{name} holds NaN, so nothing was written: these weights are broken, or come from "
                "a training that diverged."
            )
        raise UserError(
            f"{name} has values beyond the largest of {kind} ({torch.finfo(tensor.dtype).max:.4g}),"
            " so nothing was written. Write float32 or bfloat16 (export.dtype of a training, "
            "--dtype of `latentdiff convert`); weights that large may also come from a training "
            "that diverged."
        )


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file; safetensors' own can be read by their owner only, ours are as usual.

    Raises: OSError: it cannot be written; a full disk too, which safetensors calls otherwise.
            UserError: as `refuse_overflow`.
    """
    refuse_overflow(tensors)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    usual = file.stat().st_mode
    try:
        save_file(tensors, file, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    file.chmod(usual)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the order of its indices, whatever its device and memory layout."""
    plain = tensor.detach().cpu().contiguous()
    # PyTorch calls a tensor contiguous whatever the strides of its dimensions of size 1 are, such
    # as those of a channels_last 1×1 kernel, but views bytes only where the last stride is 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data
