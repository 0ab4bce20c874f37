"""The examination as one HTML file without outside references: tables, then pictures by finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.data.images import WHITE
from latentdiff.data.source import Source
from latentdiff.doctor.findings import KINDS, Finding, Findings
from latentdiff.doctor.tables import Row
from latentdiff.html_report import data_url, write_html

#: Longer side of the small pictures.
THUMBNAIL = 112
_AFTER = {
    "left out": "Training leaves these out by itself.",
    "doubtful": "Training uses these unless they are on the quarantine list.",
    "cut": "Training uses a part of these.",
    "note": "Training uses these in another form; nothing needs to be done.",
}


@dataclass(frozen=True)
class Page:
    """What the report shows."""

    title: str
    """The data set."""
    facts: Sequence[tuple[str, str]]
    """Name and value lines at the top."""
    counts: dict[str, int]
    """Findings by kind."""
    tables: Sequence[tuple[str, Sequence[Row]]]
    """Heading and rows."""
    in_quarantine: Sequence[str]
    """Kinds that went on the quarantine list."""


def write_report(file: Path, page: Page, findings: Findings, shown: int) -> None:
    """Write the report piece by piece, so that it is never in memory as a whole.

    Args: shown: how many pictures are shown of each kind; all are in findings.jsonl.
    """
    sections = [
        {
            "kind": kind,
            "severity": KINDS[kind][0],
            "heading": KINDS[kind][1],
            "consequence": _AFTER[KINDS[kind][0]],
            "count": count,
            "figures": _figures(findings, kind, shown),
        }
        for kind, count in page.counts.items()
        if count
    ]
    write_html(
        file,
        "doctor.html",
        title=page.title,
        facts=page.facts,
        tables=page.tables,
        sections=sections,
        in_quarantine=page.in_quarantine,
        shown=shown,
    )


def _figures(findings: Findings, kind: str, shown: int) -> Iterator[dict[str, Any]]:
    """What the report shows of each finding; an image is None where there is none to show."""
    for finding in islice(findings.of(kind), shown):
        rows = [row for row in (finding.index, finding.like) if row is not None]
        yield {
            "images": [_thumbnail(findings.source, row) for row in rows],
            "name": finding.name,
            "reason": finding.reason,
            "caption": _caption(findings.source, finding),
        }


def _caption(source: Source, finding: Finding) -> str:
    if finding.index is None or finding.kind not in ("long-caption", "duplicate", "similar"):
        return ""
    text = max(source.captions(finding.index), key=len, default="")
    return text if len(text) <= 300 else text[:300] + " …"


def _thumbnail(source: Source, index: int) -> str | None:
    try:
        image: Any = source[index].image
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    except Exception:  # an unreadable picture, or one that has changed since it was looked at
        return None
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image)
    return data_url(canvas, "JPEG", quality=80)
