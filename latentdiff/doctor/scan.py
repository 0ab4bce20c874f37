"""One pass over a data set in several threads, with a window of bounded size.

Pillow decodes outside Python's global lock, so threads are enough, and nothing is copied between
processes. At any moment each thread holds one picture, and large ones are decoded one at a time
(`images.LARGE_PIXELS`); what stays of a picture is its record.
"""

from __future__ import annotations

import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from latentdiff.data.images import RGB
from latentdiff.data.source import Source
from latentdiff.doctor.look import look_at
from latentdiff.doctor.records import Records
from latentdiff.doctor.tokens import TokenCounter


def scan(
    source: Source, background: RGB, counter: TokenCounter, threads: int, progress: bool = True
) -> Records:
    """Look at every picture of a source once.

    Args: threads: pictures looked at at a time.   progress: whether to draw a bar.
    """
    from tqdm import tqdm

    records = Records(len(source))

    def look(index: int) -> tuple[dict[str, Any], str | None]:
        try:
            return look_at(source, index, background, counter)
        except Exception as error:  # one picture must not end the examination of a million
            return {"flags": 0}, f"the examination failed ({type(error).__name__}: {error})"

    bar = tqdm(total=len(source), desc="looking", unit="img", disable=not progress)
    with warnings.catch_warnings(), bar, ThreadPoolExecutor(threads) as pool:
        # Pillow warns of large pictures and broken EXIF; the bar would be torn, the report says it.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        waiting: deque[tuple[int, Future[Any]]] = deque()
        upcoming = iter(range(len(source)))
        try:
            while True:
                for index in islice(upcoming, 4 * threads - len(waiting)):
                    waiting.append((index, pool.submit(look, index)))
                if not waiting:
                    return records
                index, future = waiting.popleft()
                records.put(index, *future.result())
                bar.update()
        finally:
            for _, future in waiting:  # after Ctrl-C: do not look at what is still in the queue
                future.cancel()
