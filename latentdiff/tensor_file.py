"""Reading the tensors of one file: safetensors, or a pickle that may hold nothing but tensors.

Both are mapped into memory: a tensor costs RAM when it is first used, and none while the file's
pages can be dropped. A pickle goes through PyTorch's `weights_only=True`, which builds tensors,
numbers, texts and containers and refuses everything that could run code.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError

#: Endings of the files that are read as pickles; every other file is read as safetensors.
PICKLES = (".ckpt", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class TensorFile:
    """What a file of weights holds."""

    path: Path
    """The file."""
    tensors: dict[str, Tensor]
    """By name, in the dtype that is on disk."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Free text of a safetensors file."""
    facts: dict[str, int | float | str] = field(default_factory=dict)
    """Numbers and short texts beside the tensors of a pickle, for example global_step."""


def read_tensor_file(file: Path) -> TensorFile:
    """Open a file of weights.

    Raises:  UserError: missing, cut off, damaged, or a pickle that holds more than tensors.
    """
    content, metadata = load_content(file)
    if file.suffix.lower() in PICKLES:
        return _named_tensors(file, content)
    return TensorFile(file, content, metadata)


def load_content(file: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, as it is, and the free text of a safetensors file.

    Returns: a table of tensors; of a pickle, whatever it holds of tensors, numbers and containers.
    Raises:  UserError: as `read_tensor_file`.
    """
    from safetensors import SafetensorError

    try:
        return _load(file)
    except UnpicklingError as error:
        # PyTorch's own text tells how to turn the protection off.
        raise UserError(
            f"{file} cannot be read: it is damaged, or a pickle that holds more than tensors and "
            "could run code. Ask for it as safetensors."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{file} cannot be read: it is no safetensors file, or one that was cut off or damaged "
            f"({_first_line(error)}). Get it again."
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from error


def _load(file: Path) -> tuple[Any, dict[str, str]]:
    if file.suffix.lower() in PICKLES:
        mapped = zipfile.is_zipfile(file)  # files of PyTorch before 1.6 are not
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None), {}
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    return load_file(file), metadata


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in the order of its indices, whatever its device and memory layout."""
    plain = tensor.detach().cpu().contiguous()
    # PyTorch calls a tensor contiguous whatever the strides of its dimensions of size 1 are, such
    # as those of a channels_last 1×1 kernel, but views bytes only where the last stride is 1.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy().data


class _Inert:
    """Stands for a class of another library that checkpoints mention: has no code, does nothing."""

    def __setstate__(self, state: Any) -> None:
        """Forget what the other class would keep."""


#: Training libraries leave such objects beside the weights, as keys of callbacks' states.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, f"{package}.callbacks.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "lr_monitor.LearningRateMonitor",
        "early_stopping.EarlyStopping",
    )
]


def _named_tensors(file: Path, data: Any) -> TensorFile:
    if not isinstance(data, Mapping):
        kind = type(data).__name__
        raise UserError(f"{file} cannot be read: it holds a {kind} instead of named tensors.")
    state = data.get("state_dict", data)
    if not isinstance(state, dict | OrderedDict):
        raise UserError(f"{file} cannot be read: its state_dict holds no named tensors.")
    nested = {
        f"{k}.{i}": t for k, v in state.items() if isinstance(v, Mapping) for i, t in v.items()
    }
    named = {**state, **nested}
    tensors = {str(k): t.detach() for k, t in named.items() if isinstance(t, Tensor)}
    plain = {str(k): v for k, v in data.items() if isinstance(v, int | float | str)}
    return TensorFile(file, tensors, facts=plain)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
