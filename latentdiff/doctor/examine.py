"""The whole examination: open, look, judge, write. No file of the data set is changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from posixpath import splitext

from latentdiff.data.file_tree import open_tree
from latentdiff.data.folder import METADATA_NAMES
from latentdiff.data.images import IMAGE_ENDINGS, display_name
from latentdiff.data.quarantine import json_line, write_quarantine
from latentdiff.data.source import DataConfig, Skipped, open_source
from latentdiff.doctor.findings import KINDS, Finding, Findings, Limits, quarantined
from latentdiff.doctor.records import READABLE
from latentdiff.doctor.report import Page, write_report
from latentdiff.doctor.scan import scan
from latentdiff.doctor.tables import bucket_table, caption_table, mode_table, size_table
from latentdiff.doctor.tokens import TokenCounter
from latentdiff.errors import UserError

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
    findings = Findings(source, records, order.counter, order.limits, unused_files(order.data))
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


def unused_files(data: DataConfig) -> list[Skipped]:
    """Name the files of a folder that training never looks at, and why."""
    if data.kind != "folder":
        return []
    names = open_tree(data.path or "", data.follow_links).names()
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    tables = any(name.rsplit("/", 1)[-1] in METADATA_NAMES for name in names)
    partners = {splitext(name)[0] for name in images} | set(images)
    unused = []
    for name in sorted(set(names).difference(images)):
        stem, ending = splitext(name)
        if name.rsplit("/", 1)[-1] in METADATA_NAMES:
            continue
        if ending != ".txt":
            reason = f"files ending in {ending or 'nothing'} are not looked for"
        elif stem not in partners:
            reason = "a text without a picture"
        elif tables:
            reason = "captions are taken from the metadata file, not from texts"
        else:
            continue
        unused.append((display_name(name), reason))
    return unused


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
