"""The whole examination: open, look, judge, write. No file of the data set is changed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from latentdiff.data.folder import unused_files
from latentdiff.data.quarantine import json_line, write_quarantine
from latentdiff.data.source import DataConfig, FileSource, open_source
from latentdiff.doctor.findings import KINDS, Finding, Findings, Order, quarantined
from latentdiff.doctor.records import scan
from latentdiff.doctor.report import write_report
from latentdiff.errors import UserError

REPORT, LIST, ALL = "report.html", "quarantine.jsonl", "findings.jsonl"
#: Names of each kind of findings in the summary.
NAMED = 3


@dataclass(frozen=True)
class Result:
    """What was found, in numbers."""

    images: int
    """Images looked at."""
    readable: int
    """Those that can be decoded."""
    counts: dict[str, int]
    """Findings by kind."""
    names: dict[str, list[str]]
    """The first names of each kind."""
    quarantined: int
    """Images on the list."""
    seconds: float
    """How long it took."""


def examine(order: Order, progress: bool = True) -> Result:
    """Look at a data set and write report.html, quarantine.jsonl and findings.jsonl.

    Raises: UserError: as opening the data for training does; or the output cannot be written.
    """
    began = time.monotonic()
    source = cast(FileSource, open_source(order.data))  # all that a configuration opens are
    make_output(order.output, order.data)
    records = scan(source, order.counter, order.threads, progress)
    ignored = unused_files(order.data) if order.data.kind == "folder" else []
    findings = Findings(source, records, order, ignored)
    try:
        counts = write_findings(order.output / ALL, findings)
        names = {kind: [f.name for f in islice(findings.of(kind), NAMED)] for kind in counts}
        listed = quarantined(findings, order.quarantine)
        write_quarantine(order.output / LIST, listed.items())
        readable, seconds = int(records.readable.sum()), time.monotonic() - began
        result = Result(len(source), readable, counts, names, len(listed), seconds)
        write_report(order.output / REPORT, result, findings)
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
