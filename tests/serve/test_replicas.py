"""Two replicas on Ray Serve, with CPUs."""

from __future__ import annotations

import asyncio
import signal
import time

import httpx
import numpy as np
import pytest

from benchmarks.serve import Answer, ask, request, server
from tests.launching import free_port

pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.mark.slow
def test_two_replicas_answer_alike() -> None:
    port = free_port()
    with server("--replicas", "2", port=port) as process:
        url = f"http://127.0.0.1:{port}"

        async def eight() -> list[Answer]:
            """One picture eight times at once, so that both replicas have work."""
            async with httpx.AsyncClient(base_url=url, timeout=None) as client:
                asked = await asyncio.gather(*(ask(client, 0, 4) for _ in range(8)))
            return [answer for answer, _ in asked if answer is not None]

        first, *others = asyncio.run(eight())
        assert len(others) == 7
        assert all(np.abs(one.pixels - first.pixels).max() <= 1 for one in others)

        long = {**request(1, 100), "num_images": 8}
        with httpx.stream("POST", f"{url}/api/text_to_image", json=long, timeout=None) as answer:
            next(answer.iter_lines())
        quiet = 0  # answers in a row without work; they come from either replica
        while quiet < 12:
            health = httpx.get(f"{url}/health").json()
            quiet = 0 if health["making"] or health["waiting"] else quiet + 1
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
