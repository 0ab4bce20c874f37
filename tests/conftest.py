"""What all tests share.

Tests that run side by side share the cores: each process, and what it starts, takes its part.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if WORKERS:
    # Before torch is imported: its thread pool reads this once.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell starts with &
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def flops_of_a_network_are_counted_once() -> Iterator[None]:
    """Every training counts them at its start, which is a quarter of a tiny training.

    The tests of the count itself call it directly.
    """
    from latentdiff.train import log as flops

    count, known = flops.count_flops, dict[str, int]()

    def counted(unet: Any, *what: Any, **more: Any) -> int:
        key = repr((unet.config, what, more))
        if key not in known:
            known[key] = count(unet, *what, **more)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "count_flops", counted)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: "test_it_learns" not in item.nodeid)
