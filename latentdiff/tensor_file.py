"""One file of tensors: safetensors, or a pickle that may hold nothing else.

What a file is, its first bytes say; its name may say otherwise. Both kinds are mapped into memory:
a tensor costs RAM when it is first used, and none while the file's pages can be dropped. A pickle
goes through PyTorch's `weights_only=True`, which builds tensors, numbers, texts and containers and
refuses everything that could run code. It hashes every key of a table: a tuple that holds a tuple
twice, forty times over, takes some hundred bytes and 2^40 steps, so such tuples are refused before.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, Literal

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.sniff import HEAD, IMAGES, sniff

#: Endings of the files that are pickles, when nothing in them says what they are.
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
#: Endings of all files of weights.
ENDINGS = (".safetensors", *PICKLES)


def weights_format(file: Path) -> Literal["safetensors", "pickle"]:
    """How the file is to be read.

    Raises: OSError: it cannot be read.  UserError: it is something else, which is named.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    if other := _other(file, head):
        what, advice = other
        raise UserError(f"{file} cannot be read: it is {what}. {advice or 'Download it again'}.")
    # A header's length, which is at most 100 MB, and the beginning of the header.
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    ending = file.suffix.lower()
    is_pickle = head.startswith((b"PK\3\4", b"\x80"))
    if is_pickle and ending == ".safetensors":  # which torch.load goes by
        raise UserError(
            f"{file} is a pickle of PyTorch, not safetensors. Rename it to end in .ckpt."
        )
    return "pickle" if is_pickle or ending in PICKLES else "safetensors"


def _other(file: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that holds no weights, and what to do ("": download it again); or None."""
    if head[4:9] == b"\0\0\0\0{":
        return None
    if head.startswith(b"PK"):
        return _other_archive(file)
    image = next((name for start, name in IMAGES.items() if head.startswith(start)), None)
    return (image, "") if image else sniff(head)


def _other_archive(file: Path) -> tuple[str, str] | None:
    """What a ZIP archive is, unless it is what PyTorch writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        return "an archive that was cut off or damaged", ""
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript program", "Ask for its weights as safetensors"
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        some = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        return f"a ZIP archive ({some or 'empty'})", "Unpack it, and name the file in it"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return (
            "a compressed archive of a pickle",
            "Save it with torch.save, which compresses nothing",
        )
    return None


#: Values of a tuple with those of the tuples in it; tensors come with some dozens.
MOST_VALUES = 10**6
#: Pickles in a row at the beginning of a file of PyTorch before 1.6: two numbers, facts, the data,
#: keys of the storages.
_OLD_ROW = 5
#: What an instruction takes from the stack besides single values.
_TO_MARK = (pickletools.markobject, pickletools.stackslice)


def _refuse_endless_tuples(file: Path) -> None:
    """Read the instructions of a pickle without following them.

    Raises: UserError: a tuple of too many values.  Other errors: the file is damaged.
    """
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            for _ in range(_OLD_ROW):
                _check(opened, file)
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():  # of two entries of one name a name opens the last alone
            if entry.filename == "data.pkl" or entry.filename.endswith("/data.pkl"):
                with archive.open(entry) as opened:
                    _check(opened, file)


def _check(pickle: IO[bytes], file: Path) -> None:
    """Follow how many values stand for each place of the stack; only tuples stand for several."""
    mark, stack, memo = 0, list[int](), dict[Any, int]()
    for code, argument, _ in pickletools.genops(pickle):
        taken = list[int]()
        if pickletools.markobject in code.stack_before:
            while (top := stack.pop()) != mark:
                taken.append(top)
        taken += [stack.pop() for one in code.stack_before if one not in _TO_MARK]
        if "TUPLE" in code.name:
            stack.append(1 + sum(taken))
            if stack[-1] > MOST_VALUES:
                raise UserError(
                    f"{file} cannot be used: a tuple in it stands for over {MOST_VALUES:,} values. "
                    "Ask for it as safetensors."
                )
        elif "GET" in code.name:
            stack.append(memo[argument])
        elif "PUT" in code.name:
            memo[argument] = stack[-1]
        elif code.name == "MEMOIZE":
            stack.append(taken[0])
            memo[len(memo)] = taken[0]
        else:
            stack += [mark if one is pickletools.markobject else 1 for one in code.stack_after]


#: Names of tensors: characters of each, and how many there may be.
LONGEST_NAME, MOST_NAMES = 1000, 10**6
#: Tensors that share memory may have so many times the bytes of the file together.
MOST_SHARING = 8


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
    state = data.get("state_dict", content)
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise UserError(f"{file} cannot be read: it holds a {kind} instead of named tensors.")
    tensors = _named(file, state)
    _refuse_inflated(file, tensors.values())
    facts = {k: v for k, v in data.items() if isinstance(k, str) and _is_fact(v)}
    return TensorFile(file, tensors, metadata, facts)


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


def _is_fact(value: Any) -> bool:
    return isinstance(value, float | str) or (isinstance(value, int) and value.bit_length() <= 64)


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


@contextmanager
def pickles_refused() -> Iterator[None]:
    """Have pickles refused within the block, also those that hold nothing but tensors."""
    before = _refuse.set(True)
    try:
        yield
    finally:
        _refuse.reset(before)


_refuse = ContextVar("pickles are refused", default=False)


def _load_pickle(file: Path) -> tuple[Any, dict[str, str]]:
    if _refuse.get():
        raise UserError(
            f"{file} is a pickle, which is not read here. Turn it into safetensors first, as "
            "`latentdiff convert` does with models and LoRA files."
        )
    _refuse_endless_tuples(file)
    mapped = zipfile.is_zipfile(file)  # files of PyTorch before 1.6 are not
    with torch.serialization.safe_globals(_SAFE_GLOBALS):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped or None), {}


class _Inert:
    """Stands for a class of another library that checkpoints mention: has no code, does nothing."""

    def __setstate__(self, state: Any) -> None:
        """Forget what the other class would keep."""


#: Training libraries leave such objects beside the weights, as keys of callbacks' states.
_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, f"{package}.callbacks.{name}")
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "model_checkpoint.ModelCheckpoint",
        "lr_monitor.LearningRateMonitor",
        "early_stopping.EarlyStopping",
    )
]


def _tensors_in(file: Path, content: Any) -> Iterator[Tensor]:
    """Every tensor in containers within each other, which are looked into once."""
    seen, waiting = set[int](), [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping | list | tuple) and id(one) not in seen:
            seen.add(id(one))
            table = one if isinstance(one, Mapping) else {}
            waiting += table.values() if table else one
            names = (name for name in table if isinstance(name, str))
            if long := next((name for name in names if len(name) > LONGEST_NAME), None):
                raise UserError(
                    f"{file} cannot be used: the name {long[:40]!r}… in it has {len(long):,} "
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


def usual_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of the names that is in a folder, or the one safetensors file; None: neither."""
    found = [folder / name for name in names if (folder / name).is_file()]
    others = found or sorted(folder.glob("*.safetensors"))
    return others[0] if found or len(others) == 1 else None
