"""Reading and writing one component's weights: safetensors, whole or in shards.

STEM.safetensors, or STEM-00001-of-0000N.safetensors … with STEM.safetensors.index.json
STEM.fp16.safetensors is read when nothing else is there; STEM.bin through weights_only=True
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError

UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_STEM = "model"
#: Weights that stay float32 in a 16-bit file: frequencies, where rounding changes whole turns.
KEEP_FLOAT32 = ("time_proj.weight",)


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read a component's state dict, in the dtype that is on disk.

    Raises:  UserError: no weights, a missing shard, or a file that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = _safetensors(folder, stem)
    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state |= load_file(file)
        if not files:
            pickle = folder / f"{stem}.bin"
            # weights_only refuses everything that could run code.
            state = torch.load(pickle, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # PyTorch's own text tells how to turn the protection off.
        raise UserError(
            f"the weights in {folder} cannot be read: {stem}.bin is damaged, or a pickle that "
            "holds more than tensors. Ask for the model as safetensors."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"the weights in {folder} cannot be read: {error}") from error
    return state


def place_weights(
    module: nn.Module, state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Put the tensors of a file into a network built on the meta device; others are ignored.

    Raises: UserError: a weight of the network is missing or has another shape.
    """
    wanted = module.state_dict()
    refuse_misfit(
        [n for n, t in wanted.items() if n not in state or state[n].shape != t.shape], folder
    )
    module.load_state_dict({n: state[n].to(dtype) for n in wanted}, assign=True)


def refuse_misfit(names: list[str], folder: Path) -> None:
    """Name weights that do not fit. Raises: UserError: unless there are none."""
    if names:
        raise UserError(
            f"the weights in {folder} do not fit its config.json; missing or of another shape: "
            f"{', '.join(sorted(names)[:5])}{' …' if len(names) > 5 else ''}"
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
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in state.items()}
    shards = _shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        _save(tensors, folder / f"{stem}.safetensors")
        return
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        _save({name: tensors[name] for name in names}, folder / file)
        placed |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """safetensors makes files that only their owner can read; a new file of ours is as usual."""
    from safetensors.torch import save_file

    file.touch()
    usual = file.stat().st_mode
    save_file(tensors, file, {"format": "pt"})
    file.chmod(usual)


def _safetensors(folder: Path, stem: str) -> list[Path]:
    """The files that together hold the weights; empty when there is only a pickle."""
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(placed.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise UserError(f"{index} names {file.name}, which is not in {folder}.")
        return files
    half = folder / f"{stem}.fp16.safetensors"
    if half.is_file():
        return [half]
    if not (folder / f"{stem}.bin").is_file():
        raise UserError(f"no weights in {folder}: expected {whole.name} (or shards with an index).")
    return []


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    keep = name.endswith(KEEP_FLOAT32) or not tensor.is_floating_point()
    return tensor.detach().to("cpu", tensor.dtype if keep else dtype).contiguous()


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards
