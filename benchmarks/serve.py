"""Many clients at one server: is every picture its own, does memory stay flat, what is the speed?

    python benchmarks/serve.py [--requests 200] [--clients 20] [--steps 8] [--model FOLDER]

Starts `latentdiff serve` on loopback, asks for every picture alone, one after the other, then for
all of them again from all clients at once (each from a loopback address of its own). Prints what
was lost, the largest difference from its own serial picture, images per second of both, how large
the batches were, and the memory of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
import psutil
from PIL import Image

from latentdiff.errors import UserError, command

THINGS = ("cat", "dog", "apple", "car", "house", "tree", "fish", "cup")
#: A server that is not up after so long is not coming.
PATIENCE = 120


class Answer(NamedTuple):
    """One picture and how it was made."""

    pixels: np.ndarray[Any, Any]
    settings: dict[str, Any]


class Load(NamedTuple):
    """What came of many requests."""

    answers: list[Answer | None]
    """None: lost."""
    seconds: float
    refused: int
    """Answers 429, after which the client came again."""


def request(number: int, steps: int) -> dict[str, Any]:
    """The n-th: of several prompts, seeds, guidance scales and two sizes, one in eight larger."""
    size = {"height": 96, "width": 96} if number % 8 == 7 else {}
    return {
        "prompt": f"a {THINGS[number % len(THINGS)]}",
        "seed": str(1000 + number),
        "guidance_scale": 2.0 + number % 3,
        "num_inference_steps": steps,
        **size,
    }


@contextmanager
def server(*arguments: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`latentdiff serve`, up. Raises: UserError: it did not come up."""
    started = [sys.executable, "-m", "latentdiff", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(started)
    try:
        for _ in range(PATIENCE * 10):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise UserError(f"the server ended with {process.returncode}.") from None
                time.sleep(0.1)
        else:
            raise UserError("the server did not come up.")
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def ask(client: httpx.AsyncClient, number: int, steps: int) -> tuple[Answer | None, int]:
    """The picture of a request, however often it is refused; and how often it was."""
    path, body, refused = "/api/text_to_image", request(number, steps), 0
    while (answer := await client.post(path, json=body)).status_code == 429:
        refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
    last = json.loads(answer.text.strip().split("\n")[-1])
    if answer.status_code != 200 or last["event"] != "result":
        print(f"request {number}: {answer.status_code} {last}", file=sys.stderr)
        return None, refused
    made = last["images"][0]
    image = Image.open(BytesIO(base64.b64decode(made["image"].partition(",")[2])))
    return Answer(np.array(image.convert("RGB"), dtype=np.int16), made["settings"]), refused


async def load(port: int, numbers: Sequence[int], clients: int, steps: int) -> Load:
    """Ask for all numbers, client k for every k-th, each one after the other."""
    answers, refused = dict[int, Answer | None](), Counter[str]()

    async def one(k: int) -> None:
        transport = httpx.AsyncHTTPTransport(local_address=f"127.0.1.{k + 1}")
        base = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(transport=transport, base_url=base, timeout=None) as client:
            for number in numbers[k::clients]:
                answers[number], again = await ask(client, number, steps)
                refused["times"] += again

    begun = time.monotonic()
    await asyncio.gather(*map(one, range(clients)))
    found = [answers[number] for number in numbers]
    return Load(found, time.monotonic() - begun, refused["times"])


def largest_difference(alone: Load, together: Load) -> int:
    """Of any pixel of any picture from its own serial one, in steps of 1/255."""
    pairs = zip(alone.answers, together.answers, strict=True)
    both = [(a.pixels, b.pixels) for a, b in pairs if a is not None and b is not None]
    return max((int(np.abs(a - b).max()) for a, b in both), default=0)


def measure(
    port: int, requests: int, clients: int, steps: int, process: subprocess.Popen[bytes]
) -> dict[str, Any]:
    """All figures of a server that is up."""
    served = psutil.Process(process.pid)
    memory = served.memory_info
    numbers = range(requests)
    alone = asyncio.run(load(port, numbers, 1, steps))
    at_rest = memory().rss
    first = asyncio.run(load(port, numbers, clients, steps))
    after_one, before = memory().rss, sum(served.cpu_times()[:2])
    again = asyncio.run(load(port, numbers, clients, steps))
    busy = (sum(served.cpu_times()[:2]) - before) / again.seconds
    sizes = Counter(one.settings["batch"]["size"] for one in first.answers if one is not None)
    return {
        "lost": sum(one is None for load in (alone, first, again) for one in load.answers),
        "largest_difference": max(largest_difference(alone, x) for x in (first, again)),
        "refused": first.refused + again.refused,
        "images_per_second_alone": requests / alone.seconds,
        "images_per_second_together": requests / again.seconds,
        "cores_busy": busy,
        "images_by_batch_size": dict(sorted(sizes.items())),
        "megabytes": [round(rss / 2**20) for rss in (at_rest, after_one, memory().rss)],
    }


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--port", type=int, default=7878)
    args = parser.parse_args(arguments)
    with server(*args.model, port=args.port) as process:
        figures = measure(args.port, args.requests, args.clients, args.steps, process)
    for name, value in figures.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
