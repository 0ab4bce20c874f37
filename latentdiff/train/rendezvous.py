"""A rendezvous of its own for every attempt of a run that the launcher restarts.

torch's launcher keeps one key-value store for all attempts, so a restarted process may read there
the address of one that is dead, and then fails ("Connection refused") or hangs. So the processes of
an attempt first agree on a number that no attempt before had, and use it as the prefix of their
keys. They cannot count restarts: the launcher on each machine counts only those it caused.

The launcher has to have ended all processes of an attempt before it starts the next, which it does
on one machine, and with `rdzv_backend: c10d` on several.

Upstream: github.com/pytorch/pytorch/issues/135712 (closed, but its fix still reuses the store when
the launcher itself goes on) and 167288 (open). No release is free of it yet: with torch 2.13.0 and
without this module a restart under c10d ends in "connectFullMesh failed", under static it hangs.
The module can go with the first torch where
tests/test_sharded_runs.py::test_one_process_dies_while_saving_and_the_launcher_goes_on passes with
`init_method` returning None. TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launcher's environment
avoids it too, but under c10d only.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

#: The URL scheme of this rendezvous for `init_process_group(init_method=…)`.
SCHEME = "fresh"
#: Processes of one attempt start within this time of each other; then something is wrong.
LIMIT = timedelta(minutes=30)
#: Seconds between two looks at the store.
_PAUSE = 0.02
#: The number of this process's attempt, once it is known.
_number = 0


def attempt() -> int:
    """The number of this attempt, from 1; 0 where the launcher shares no store or nobody met yet.

    Above 1 the run was started again, maybe because of another machine.
    """
    return _number


def was_restarted() -> bool:
    """Whether the launcher has started this run again after a failure (its `max_restarts`).

    Of a failure on another machine it is known only once the processes have met.
    """
    return attempt() > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def init_method() -> str | None:
    """The `init_method` of this launch; None for torch's own.

    Only a launcher that shares its store with the processes needs another one.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    _register()
    return f"{SCHEME}://"


@cache
def _register() -> None:
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(SCHEME, _meet)


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Any, int, int]]:
    """torch's rendezvous handler: yields (store, rank, number of processes)."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous(url.replace(SCHEME, "env", 1), timeout=timeout, **options))
    global _number
    _number = agree(store, rank, count, min(timeout, LIMIT))
    yield PrefixStore(f"attempt-{_number}", store), rank, count


def agree(store: Any, rank: int, count: int, timeout: timedelta) -> int:
    """Return a number that all processes of this attempt share and no earlier attempt had.

    The first process draws it. Each other one asks under a name that nobody had before, so an
    answer to it cannot be an old one; the first process answers every question it finds, old ones
    too, until each process has said, under the name that it asks by now, that it got the number.

    Args:    store: torch's key-value store.  rank, count: this process, of how many.
    Raises:  TimeoutError, or torch's DistStoreError: somebody did not come in time.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"asks/{rank}", name)
        store.wait([f"answer/{name}"], timeout)
        number = int(store.get(f"answer/{name}"))
        store.set(f"has/{number}/{name}", "yes")
        return number
    number = store.add("attempts", 1)
    answered, end = set[str](), time.monotonic() + timeout.total_seconds()
    while missing := [r for r in range(1, count) if not _has(store, r, number, answered)]:
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} for the processes {missing}")
        time.sleep(_PAUSE)
    return int(number)


def _has(store: Any, rank: int, number: int, answered: set[str]) -> bool:
    """Whether the process that is `rank` now has this attempt's number; answers its question."""
    if not store.check([f"asks/{rank}"]):
        return False
    name = store.get(f"asks/{rank}").decode()
    if name not in answered:
        store.set(f"answer/{name}", str(number))
        answered.add(name)
    return bool(store.check([f"has/{number}/{name}"]))
