"""Many clients at once, over HTTP."""

from __future__ import annotations

import pytest

from benchmarks.serve import measure, server
from tests.launching import free_port


@pytest.mark.slow
def test_sixty_requests_of_twenty_clients() -> None:
    """None lost, none wrong, some refused on the way and made all the same; memory flat."""
    port = free_port()
    with server("--max-waiting", "12", port=port) as process:
        figures = measure(port, 60, 20, 4, process)
    assert figures["lost"] == 0 and figures["largest_difference"] <= 1
    assert figures["refused"] > 0
    assert max(figures["images_by_batch_size"]) > 1
    at_rest, once, twice = figures["megabytes"]
    assert once < at_rest + 150 and twice < once + 40
