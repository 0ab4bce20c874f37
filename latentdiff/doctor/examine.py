"""The whole examination: open, look, judge, write. No file of the data set is changed.

One pass looks at the pictures in several threads, with a window of bounded size. Pillow decodes
outside Python's global lock, so threads are enough, and nothing is copied between processes. At any
moment each thread holds one picture, and large ones are decoded one at a time
(`images.LARGE_PIXELS`); what stays of a picture is its record.
"""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.data.folder import unused_files
from latentdiff.data.images import RGB, UnreadableImage, open_image
from latentdiff.data.quarantine import json_line, write_quarantine
from latentdiff.data.source import DataConfig, Source, map_ahead, open_source
from latentdiff.doctor.findings import (
    ANIMATED,
    KINDS,
    ONE_COLOUR,
    READABLE,
    ROTATED,
    TRANSPARENT,
    Finding,
    Findings,
    Limits,
    Records,
    TokenCounter,
    quarantined,
)
from latentdiff.doctor.findings import WRONG_ENDING as WRONG
from latentdiff.doctor.likeness import outline_and_colours
from latentdiff.doctor.report import Page, write_report
from latentdiff.doctor.tables import bucket_table, caption_table, mode_table, size_table
from latentdiff.errors import UserError


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

    looked = map_ahead(look, range(len(source)), threads, 4 * threads)
    with warnings.catch_warnings():
        # Pillow warns of large pictures and broken EXIF; the bar would be torn, the report says it.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        bar = tqdm(looked, "looking", len(source), unit="img", disable=not progress)
        for index, (facts, reason) in enumerate(bar):
            records.put(index, facts, reason)
    return records


_ORIENTATION = 0x0112
#: Endings by the format that a file of that name should hold.
_ENDINGS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "MPO": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "DIB": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_ALL_ENDINGS = {ending for endings in _ENDINGS.values() for ending in endings}


def look_at(
    source: Source, index: int, background: RGB, counter: TokenCounter
) -> tuple[dict[str, Any], str | None]:
    """Read, decode and measure one picture exactly as training would.

    Returns: facts for `Records.put`, and why the picture cannot be read (None when it can).
    """
    facts = _captions(source.captions(index), counter)
    read = getattr(source, "read", None)
    try:
        if callable(read):
            data = read(index)
            facts["digest"] = _digest(data)
            image = open_image(data, source.name(index), background)
            facts |= _header(data, source.name(index))
        else:  # a source that draws its pictures, or keeps the files to itself
            image = source[index].image
            facts |= {"digest": _digest(image.tobytes()), "mode": image.mode, "format": "drawn"}
    except UnreadableImage as error:
        return facts | {"flags": 0}, error.reason
    outline, colours, one_colour = outline_and_colours(image)
    flags = facts.get("flags", 0) | READABLE | ONE_COLOUR * one_colour
    size = {"width": image.width, "height": image.height}
    return facts | size | {"outline": outline, "colours": colours, "flags": flags}, None


def _captions(captions: tuple[str, ...], counter: TokenCounter) -> dict[str, Any]:
    counts = [counter.count(text) for text in captions]
    return {
        "captions": min(255, len(counts)),
        "longest": max(counts, default=0),
        "too_long": sum(count > counter.limit for count in counts),
    }


def _header(data: bytes, name: str) -> dict[str, Any]:
    """What a file says about itself, without decoding it a second time."""
    with Image.open(io.BytesIO(data)) as image:
        flags = ANIMATED * _safe(lambda: getattr(image, "is_animated", False))
        flags |= ROTATED * _safe(lambda: _is_rotated(image))
        flags |= TRANSPARENT * image.has_transparency_data
        kind = image.format or "?"
        ending = PurePosixPath(name).suffix.lower()
        wrong = ending in _ALL_ENDINGS and ending not in _ENDINGS.get(kind, ())
        return {"mode": image.mode, "format": kind, "flags": flags | WRONG * wrong}


def _is_rotated(image: Image.Image) -> bool:
    # Asking a PNG that has no such entry would decode it to look behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    return known and image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _safe(ask: Any) -> bool:
    """Ask a decoder; broken data beside good pixels raises nearly anything."""
    try:
        return bool(ask())
    except Exception:
        return False


def _digest(data: bytes) -> Any:
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)


REPORT, LIST, ALL = "report.html", "quarantine.jsonl", "findings.jsonl"


@dataclass(frozen=True)
class Order:
    """What is asked of the doctor."""

    data: DataConfig
    """The data set, opened as training opens it."""
    limits: Limits
    """From where on something is a finding."""
    counter: TokenCounter
    """How captions are counted."""
    quarantine: tuple[str, ...]
    """Kinds of findings that go on the quarantine list."""
    output: Path
    """Folder of the report; it is made."""
    threads: int
    """Pictures looked at at a time."""
    shown: int
    """Pictures shown of each kind."""


@dataclass(frozen=True)
class Result:
    """What was found, in numbers."""

    pictures: int
    """Pictures looked at."""
    readable: int
    """Those that can be decoded."""
    counts: dict[str, int]
    """Findings by kind."""
    quarantined: int
    """Pictures on the list."""
    seconds: float
    """How long it took."""


def examine(order: Order, progress: bool = True) -> Result:
    """Look at a data set and write report.html, quarantine.jsonl and findings.jsonl.

    Raises: UserError: as opening the data for training does; or the output cannot be written.
    """
    began = time.monotonic()
    source = open_source(order.data)
    make_output(order.output, order.data)
    records = scan(source, order.data.background, order.counter, order.threads, progress)
    ignored = unused_files(order.data) if order.data.kind == "folder" else []
    findings = Findings(source, records, order.counter, order.limits, ignored)
    try:
        counts = write_findings(order.output / ALL, findings)
        listed = quarantined(findings, order.quarantine)
        write_quarantine(order.output / LIST, listed.items())
        readable = int((records.table["flags"] & READABLE > 0).sum())
        seconds = time.monotonic() - began
        result = Result(len(source), readable, counts, len(listed), seconds)
        write_report(order.output / REPORT, _page(order, result, findings), findings, order.shown)
        return result
    except BaseException as error:  # Ctrl-C too: all three files or none
        for name in (ALL, LIST, REPORT):
            (order.output / name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"--output: {order.output} cannot be written ({error}).") from error
        raise


def make_output(folder: Path, data: DataConfig) -> None:
    """Make the output folder. Raises: UserError: it holds something, or lies in the data set."""
    root = Path(data.path).expanduser().resolve() if data.path else None
    if root is not None and root.is_dir() and folder.resolve().is_relative_to(root):
        raise UserError(
            f"--output={folder} lies in the data set, where nothing is written. Choose another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be made ({error}).") from error
    if found is not None:
        raise UserError(
            f"--output={folder} is not empty (it holds {found.name}), and nothing is ever "
            "overwritten. Choose another folder."
        )


def write_findings(file: Path, findings: Iterable[Finding]) -> dict[str, int]:
    """Write every finding as a JSON line; return how many there are of each kind."""
    counts = Counter(dict.fromkeys(KINDS, 0))
    with file.open("w", encoding="utf-8") as lines:
        for finding in findings:
            counts[finding.kind] += 1
            entry = {"kind": finding.kind, "name": finding.name, "reason": finding.reason}
            lines.write(json_line(entry))
    return dict(counts)


def _page(order: Order, result: Result, findings: Findings) -> Page:
    records, counter = findings.records, findings.counter
    facts = [
        ("pictures with captions", f"{result.pictures}, of which {result.readable} can be read"),
        ("quarantine list", f"{result.quarantined} pictures: {', '.join(order.quarantine) or '—'}"),
        ("training square", f"{order.limits.image_size} pixels, crop {order.data.crop}"),
        ("tokens", f"{counter.words}; the text encoder takes {counter.limit}"),
        ("looked at in", f"{result.seconds:.1f} s by {order.threads} threads"),
    ]
    if not findings.likeness_complete:
        facts.append(("look-alikes", "too many to compare every pair; some may be missing"))
    tables = (
        ("Aspect ratios", bucket_table(records, order.limits.image_size)),
        ("Formats and colour modes", mode_table(records)),
        ("Shorter side", size_table(records)),
        ("Longest caption of a picture", caption_table(records, counter)),
    )
    title = f"Data set {order.data.path or order.data.kind}"
    return Page(title, facts, result.counts, tables, order.quarantine)
