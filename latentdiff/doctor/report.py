"""The examination as one HTML file without outside references: tables, then pictures by finding."""

from __future__ import annotations

import base64
import html
import io
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
from latentdiff.errors import printable

#: Longer side of the small pictures.
THUMBNAIL = 112
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; background: #fff }
h2 { margin-top: 2.2rem; border-top: 1px solid #ddd; padding-top: .8rem; font-size: 1.15rem }
h3 { margin-bottom: .3rem; font-size: 1rem } .dim { color: #666 }
table { border-collapse: collapse } td, th { padding: .15rem 1.2rem .15rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
i.bar { display: block; background: #7aa5c9; height: .7rem; min-width: 1px }
.tables { display: flex; flex-wrap: wrap; gap: 0 3rem }
figure { display: inline-block; width: 15rem; margin: .4rem; vertical-align: top }
figure div { height: 116px; display: flex; gap: 4px; align-items: flex-end }
figcaption { font-size: .78rem; overflow-wrap: anywhere }
.none { width: 96px; height: 96px; border: 1px dashed #bbb; color: #999; font-size: .75rem;
  display: flex; align-items: center; justify-content: center }
"""
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
    with file.open("w", encoding="utf-8") as out:
        for part in _parts(page, findings, shown):
            out.write(part)


def _parts(page: Page, findings: Findings, shown: int) -> Iterator[str]:
    title = _text(page.title)
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{_STYLE}</style><h1>{title}</h1><table>"
    for name, value in page.facts:
        yield f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>"
    yield "</table><h2>Findings</h2>" + _overview(page)
    yield '<h2>Tables</h2><div class="tables">'
    for heading, rows in page.tables:
        yield f"<div><h3>{_text(heading)}</h3>{_table(rows)}</div>"
    yield "</div>"
    for kind, count in page.counts.items():
        if count:
            yield from _section(kind, count, findings, shown)
    yield "</html>\n"


def _text(words: str) -> str:
    """Escape for HTML, and make signs visible that would steer a terminal or turn the writing."""
    return html.escape(printable(words))


def _overview(page: Page) -> str:
    rows = [
        f'<tr><td class="n">{count}</td><td><a href="#{kind}">{KINDS[kind][1]}</a></td>'
        f"<td>{KINDS[kind][0]}</td><td>{'quarantined' * (kind in page.in_quarantine)}</td></tr>"
        for kind, count in page.counts.items()
        if count
    ]
    return f"<table>{''.join(rows)}</table>" if rows else "<p>Nothing to say: all is well.</p>"


def _table(rows: Sequence[Row]) -> str:
    most = max((row.pictures for row in rows), default=1) or 1
    lines = [
        f"<tr><td>{_text(row.label)}</td><td class=n>{row.pictures}</td>"
        f'<td style="width:7rem"><i class=bar style="width:{row.pictures / most:.1%}"></i></td>'
        f'<td class="dim">{_text(row.remark)}</td></tr>'
        for row in rows
    ]
    return f"<table>{''.join(lines)}</table>"


def _section(kind: str, count: int, findings: Findings, shown: int) -> Iterator[str]:
    severity, words = KINDS[kind]
    yield f'<h2 id="{kind}">{words}: {count}</h2><p class="dim">{_AFTER[severity]}</p>'
    for finding in islice(findings.of(kind), shown):
        yield _figure(finding, findings.source)
    if count > shown:
        yield f'<p class="dim">… and {count - shown} more, all listed in findings.jsonl.</p>'


def _figure(finding: Finding, source: Source) -> str:
    pictures = ""
    if finding.index is not None:
        pictures = _picture(source, finding.index)
    if finding.like is not None:
        pictures += _picture(source, finding.like)
    box = f"<div>{pictures}</div>" if pictures else ""
    caption = _caption(source, finding)
    return (
        f"<figure>{box}<figcaption><b><bdi>{_text(finding.name)}</bdi></b><br>"
        f"<bdi>{_text(finding.reason)}</bdi>{caption}</figcaption></figure>"
    )


def _caption(source: Source, finding: Finding) -> str:
    if finding.index is None or finding.kind not in ("long-caption", "duplicate", "similar"):
        return ""
    text = max(source.captions(finding.index), key=len, default="")
    short = text if len(text) <= 300 else text[:300] + " …"
    return f'<br><span class="dim">“<bdi>{_text(short)}</bdi>”</span>'


def _picture(source: Source, index: int) -> str:
    try:
        image: Any = source[index].image
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    except Exception:  # an unreadable picture, or one that has changed since it was looked at
        return '<span class="none">no picture</span>'
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(image)
    data = io.BytesIO()
    canvas.save(data, "JPEG", quality=80)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{text}" alt="">'
