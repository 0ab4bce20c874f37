"""What every source shares: decoding, keys, what is left out, and reading ahead in threads."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from data_helpers import png, sample_image
from PIL import Image
from test_latent_cache import StubAutoencoder

from latentdiff.data.images import UnreadableImage
from latentdiff.data.latents import build_latent_cache
from latentdiff.data.source import DataConfig, FileSource, Source, map_ahead


class Bytes(FileSource):
    """The least that a source of one's own consists of."""

    def __init__(self, config: DataConfig, files: list[bytes], texts: list[object]) -> None:
        super().__init__(config)
        self._rows = [
            (i, file, captions)
            for i, (file, text) in enumerate(zip(files, texts, strict=True))
            if (captions := self.captions_or_skip(f"file {i}", lambda text=text: text))
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def captions(self, index: int) -> tuple[str, ...]:
        return self._rows[index][2]

    def name(self, index: int) -> str:
        return f"file {self._rows[index][0]}"

    def fingerprint(self) -> str:
        return str(self._rows)

    def read(self, index: int) -> bytes:
        return self._rows[index][1]

    def read_mask(self, index: int) -> bytes | None:
        return png(9) if self.config.loss_mask == "file" else None


def test_a_source_of_files_gives_bytes_and_captions_and_gets_the_rest(tmp_path: Path) -> None:
    config = DataConfig(image_size=16, background=(1, 2, 3))
    source = Bytes(config, [png(0), png(1), b"broken", png(3)], ["a", " ", "c", ["d", "e", "d"]])
    assert isinstance(source, Source) and len(source) == 3
    assert source.problems == [("file 1", "no caption")]
    assert np.array_equal(np.asarray(source[0].image), np.asarray(sample_image(0)))
    assert source[2].captions == ("d", "e") and source[2].mask is None
    with pytest.raises(UnreadableImage, match="file 2: not an image but a text file"):
        source[1]
    key = hashlib.blake2b(png(0) + bytes((1, 2, 3)), digest_size=16).hexdigest()
    assert source.content_key(0) == key
    cache = build_latent_cache(source, StubAutoencoder(), config, tmp_path, progress=False)
    assert [cache.name(i) for i in range(len(cache))] == ["file 0", "file 3"]
    assert [name for name, _ in cache.skipped] == ["file 1", "file 2"]

    masked = Bytes(DataConfig(loss_mask="file"), [png(0)], ["a"])
    expected = np.asarray(sample_image(9).convert("L"))
    mask = masked[0].mask
    assert isinstance(mask, Image.Image) and np.array_equal(np.asarray(mask), expected)
    key = hashlib.blake2b(png(0) + bytes((255, 255, 255)) + png(9), digest_size=16).hexdigest()
    assert masked.content_key(0) == key


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    lock, begun, taken, most = threading.Lock(), [0], [0], [0]

    def call(item: int) -> int:
        with lock:
            begun[0] += 1
            most[0] = max(most[0], begun[0] - taken[0])
        return 10 * item

    found = []
    for value in map_ahead(call, range(50), threads=3, ahead=5):
        found.append(value)
        with lock:
            taken[0] += 1
    assert found == [10 * i for i in range(50)]
    assert 1 <= most[0] <= 6  # the one that is being taken, and five ahead of it


def test_an_error_ends_reading_ahead_and_what_waits_is_not_called() -> None:
    called = []

    def call(item: int) -> int:
        called.append(item)
        if item == 2:
            raise ValueError("two")
        return item

    found = []
    with pytest.raises(ValueError, match="two"):
        for value in map_ahead(call, range(100), threads=1, ahead=4):
            found.append(value)
    assert found == [0, 1] and max(called) < 10


EVERY_CALL = """
import signal, sys
from latentdiff.data.source import map_ahead

def run(last):
    calls = 0
    def note(frame, event, argument):
        nonlocal calls
        calls += event == "call"
        if calls == last:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)
    sys.setprofile(note)
    try:
        return list(map_ahead(abs, range(6), 2, 3))
    except KeyboardInterrupt:
        return []
    finally:
        sys.setprofile(None)

number = 1
while not run(number):
    number += 1
print(number)
"""


def test_ctrl_c_at_any_call_leaves_no_thread_of_the_pool_waiting() -> None:
    """A hang, with the fault: threads wait for a lock that nobody has."""
    child = subprocess.run(
        [sys.executable, "-c", EVERY_CALL], capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0 and int(child.stdout) > 100, child.stderr
