"""A fresh meeting place for processes that the launcher starts again.

torch's launcher keeps one key-value store for all attempts of a run. A process that was started
again may read there the address of one that is dead, and then fails ("Connection refused") or
waits for good. So the processes of an attempt first agree on a number that no attempt before had,
and put it before their keys. They cannot count restarts: each machine of a run counts its own.
Source of the facts: github.com/pytorch/pytorch/issues/135712.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

#: The scheme that `init_process_group(init_method=…)` knows this meeting place by.
SCHEME = "fresh"
#: Seconds between two looks at the store.
_PAUSE = 0.02


def init_method() -> str | None:
    """How processes of this launch should meet; None for torch's own way.

    Only a launcher that may start a run again, and shares its store, needs another one.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) < 1:
        return None
    _register()
    return f"{SCHEME}://"


@cache
def _register() -> None:
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(SCHEME, _meet)


def _meet(url: str, timeout: timedelta, **options: Any) -> Iterator[tuple[Any, int, int]]:
    """What torch asks of a meeting place: (store, rank, number of processes)."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(rendezvous(url.replace(SCHEME, "env", 1), timeout=timeout, **options))
    yield PrefixStore(f"attempt-{agree(store, rank, count, timeout)}", store), rank, count


def agree(store: Any, rank: int, count: int, timeout: timedelta) -> int:
    """Return a number that all processes of this attempt share and no earlier attempt had.

    The first process draws it. Each other one asks under a name that nobody had before, so an
    answer to it cannot be an old one; the first process answers every question it finds, old ones
    too, until all processes have said that they got this attempt's number.

    Args:    store: torch's key-value store.  rank, count: this process, of how many.
    Raises:  TimeoutError, or torch's DistStoreError: somebody did not come in time.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"asks/{rank}", name)
        store.wait([f"answer/{name}"], timeout)
        number = int(store.get(f"answer/{name}"))
        store.set(f"has/{number}/{rank}", "yes")
        return number
    number = store.add("attempts", 1)
    missing, answered = set(range(1, count)), set[str]()
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"has/{number}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                name = store.get(f"asks/{other}").decode()
                if name not in answered:
                    store.set(f"answer/{name}", str(number))
                    answered.add(name)
        if missing and time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} for the processes {sorted(missing)}")
        time.sleep(_PAUSE if missing else 0)
    return int(number)
