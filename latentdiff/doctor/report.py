"""The examination as one HTML file without outside references: tables, then images by finding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentdiff.data.images import WHITE
from latentdiff.data.source import Source
from latentdiff.doctor.findings import KINDS, Finding, Findings
from latentdiff.doctor.tables import bucket_table, caption_table, mode_table, size_table
from latentdiff.html_report import data_url, write_html

if TYPE_CHECKING:
    from latentdiff.doctor.examine import Result

#: Longer side of the small images.
THUMBNAIL = 112
_AFTER = {
    "left out": "Training leaves these out by itself.",
    "doubtful": "Training uses these unless they are on the quarantine list.",
    "cut": "Training uses a part of these.",
    "note": "Training uses these in another form; nothing needs to be done.",
}


def write_report(file: Path, result: Result, findings: Findings) -> None:
    """Write the report piece by piece, so that it is never in memory as a whole."""
    records, order = findings.records, findings.order
    sections = [
        {
            "kind": kind,
            "severity": KINDS[kind].severity,
            "heading": KINDS[kind].title,
            "consequence": _AFTER[KINDS[kind].severity],
            "count": count,
            "figures": _figures(findings, kind, order.shown),
        }
        for kind, count in result.counts.items()
        if count
    ]
    write_html(
        file,
        "doctor.html",
        title=f"Data set {order.data.path or order.data.kind}",
        facts=_facts(result, findings),
        tables=(
            ("Aspect ratios", bucket_table(records, order.data.image_size)),
            ("Formats and colour modes", mode_table(records)),
            ("Shorter side", size_table(records)),
            ("Longest caption of an image", caption_table(records, order.counter)),
        ),
        sections=sections,
        in_quarantine=order.quarantine,
        shown=order.shown,
    )


def _facts(result: Result, findings: Findings) -> list[tuple[str, str]]:
    """Name and value lines at the top."""
    order, counter = findings.order, findings.order.counter
    facts = [
        ("images with captions", f"{result.images}, of which {result.readable} can be read"),
        ("quarantine list", f"{result.quarantined} images: {', '.join(order.quarantine) or '—'}"),
        ("training square", f"{order.data.image_size} pixels, crop {order.data.crop}"),
        ("tokens", f"{counter.words}; the text encoder takes {counter.limit}"),
        ("looked at in", f"{result.seconds:.1f} s by {order.threads} threads"),
    ]
    if not findings.likeness_complete:
        facts.append(("look-alikes", "too many to compare every pair; some may be missing"))
    return facts


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
        image = source[index].image
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    except Exception:  # an unreadable image, or one that has changed since it was looked at
        return None
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image)
    return data_url(canvas, "JPEG", quality=80)
