"""Reading the tensors of one file: safetensors, or a pickle that may hold nothing but tensors.

Both are mapped into memory: a tensor costs RAM when it is first used, and none while the file's
pages can be dropped. A pickle goes through PyTorch's `weights_only=True`, which builds tensors,
numbers, texts and containers and refuses everything that could run code. No tensor is larger than
what the file holds of it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.weight_formats import weights_format

#: Tensors that share memory may have so many times the bytes of the file together.
MOST_SHARING = 8
#: Names of tensors: characters of each, and how many there may be.
LONGEST_NAME, MOST_NAMES = 1000, 10**6


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

    Raises:  UserError: missing, cut off, damaged, another kind of file, a pickle that holds more
             than tensors, or tensors that are larger than what the file holds of them.
    """
    content, metadata = load_content(file)
    data = content if isinstance(content, Mapping) else {}
    state = data.get("state_dict", data)
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"{file} cannot be read: it holds a {kind} instead of named tensors.")
    if not isinstance(state, Mapping):
        raise UserError(f"{file} cannot be read: its state_dict holds no named tensors.")
    tensors = _named(file, state)
    _refuse_inflated(file, tensors.values())
    facts = {k: v for k, v in data.items() if isinstance(k, str) and _is_fact(v)}
    return TensorFile(file, tensors, metadata, facts)


def load_content(file: Path) -> tuple[Any, dict[str, str]]:
    """What a file holds, as it is, and the free text of a safetensors file.

    Returns: a table of tensors; of a pickle, whatever it holds of tensors, numbers and containers.
    Raises:  UserError: as `read_tensor_file`.
    """
    try:
        load = _load_safetensors if weights_format(file) == "safetensors" else _load_pickle
        content, metadata = load(file)
    except UserError:
        raise
    except UnpicklingError as error:
        # PyTorch's own text tells how to turn the protection off.
        raise UserError(
            f"{file} cannot be read: it is damaged, or a pickle that holds more than tensors and "
            "could run code. Ask for it as safetensors."
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # whatever damaged data make of the two libraries
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"{file} cannot be read: it was cut off or damaged ({what}). Get it again."
        ) from error
    _refuse_inflated(file, list(_tensors_in(file, content)))
    return content, metadata


def _load_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    return load_file(file), metadata


def _load_pickle(file: Path) -> tuple[Any, dict[str, str]]:
    mapped = zipfile.is_zipfile(file)  # files of PyTorch before 1.6 are not
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None), {}


def _tensors_in(file: Path, content: Any) -> Iterator[Tensor]:
    """Every tensor in containers within each other, which are looked into once."""
    seen, waiting = set[int](), [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, Mapping) else one
            if isinstance(one, Mapping):
                _check_names(file, one)


def _check_names(file: Path, table: Mapping[Any, Any]) -> None:
    for name in table:
        if isinstance(name, str) and len(name) > LONGEST_NAME:
            raise UserError(
                f"{file} cannot be used: the name {name[:40]!r}… in it has {len(name):,} "
                f"characters; at most {LONGEST_NAME:,} are allowed."
            )


def _refuse_inflated(file: Path, tensors: Collection[Tensor]) -> None:
    """Refuse tensors that would need far more memory than the file has. Raises: UserError."""
    for tensor in tensors:
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_quantized:
            raise UserError(
                f"{file} cannot be used: it holds sparse, quantised or absent tensors. Ask for it "
                "as safetensors."
            )
    total, size = sum(tensor.nbytes for tensor in tensors), file.stat().st_size
    if total > MOST_SHARING * size + 2**20:
        raise UserError(
            f"{file} cannot be used: its tensors would take {total:,} bytes of memory, which they "
            f"make of a file of {size:,} by repeating the same numbers. Ask for it as safetensors."
        )


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


def _named(file: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors by name; those of a table within the table as TABLE.NAME."""
    tables = [
        (f"{name}.", table)
        for name, table in state.items()
        if isinstance(name, str) and isinstance(table, Mapping)
    ]
    if sum(len(table) for _, table in tables) > MOST_NAMES:
        raise UserError(f"{file} cannot be used: it holds over {MOST_NAMES:,} names.")
    return {
        f"{start}{name}": tensor.detach()
        for start, table in [("", state), *tables]
        for name, tensor in table.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def refuse_not_finite(where: object, tensors: Mapping[str, Tensor]) -> None:
    """Raises: UserError: naming a tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        # Tensors of eight bits have no isfinite.
        if not (tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all():
            raise UserError(
                f"{where} cannot be used: {name} has numbers that are not finite (NaN or "
                "infinity). The training that wrote it diverged, or its 16 bits overflowed."
            )


def _is_fact(value: Any) -> bool:
    return isinstance(value, float | str) or (isinstance(value, int) and value.bit_length() <= 64)
