"""The evaluation as a page: figures in a table, every picture with its prompt."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from latentdiff.evaluation.measures import Shown

_STYLE = """
body { font: 15px system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; color: #222 }
table { border-collapse: collapse } td { padding: .15rem 1.2rem .15rem 0 }
figure { display: inline-block; margin: .3rem; width: 9rem; vertical-align: top }
figcaption { font-size: .75rem; color: #555 } img { width: 64px; image-rendering: pixelated }
i { display: block; color: #b00 }
"""


def _picture(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return f'<img src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}" alt="">'


def page(
    title: str,
    figures: dict[str, Any],
    sections: dict[str, list[Shown]],
) -> str:
    """Return one HTML file without outside references.

    Real pictures stand to the right; what is not as asked is said in red.
    """
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in figures.items()
    )
    parts = [f"<h1>{html.escape(title)}</h1><table>{rows}</table>"]
    for name, items in sections.items():
        parts.append(f"<h2>{html.escape(name)}</h2>{_figures(items)}")
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style>{''.join(parts)}\n"
    )


def _figures(items: Sequence[Shown]) -> str:
    return "".join(
        f"<figure>{_picture(item.ours)}{_picture(item.real) if item.real else ''}"
        f"<figcaption>{html.escape(item.prompt)}{_miss(item.miss)}</figcaption></figure>"
        for item in items
    )


def _miss(words: str) -> str:
    return f"<i>{html.escape(words)}</i>" if words else ""
