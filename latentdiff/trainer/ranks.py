"""Which process this is, of how many, and what the others say."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import distributed

from latentdiff.errors import UserError

T = TypeVar("T")


def process_rank() -> int:
    """This process, 0 … count − 1; 0 before processes have joined."""
    return distributed.get_rank() if _joined() else 0


def process_count() -> int:
    """How many processes have joined; 1 without any other."""
    return distributed.get_world_size() if _joined() else 1


def share(value: T) -> list[T]:
    """What every process gives here, in order of rank; waits until all have given theirs."""
    if process_count() == 1:
        return [value]
    found: list[T | None] = [None] * process_count()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def on_first(action: Callable[[], T]) -> T | None:
    """Run an action on the first process while the others wait; for all processes.

    Returns: its result there, None elsewhere.
    Raises:  UserError: on all processes, what it raised on the first.
    """
    result, problem = None, None
    if process_rank() == 0:
        try:
            result = action()
        except UserError as error:
            problem = error
    if problem := share(problem)[0]:
        raise problem
    return result


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
