"""Line charts as SVG text: enough for a run's curves, without a plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 8, 8, 24
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
#: More points than this are averaged in groups: no screen shows more.
MAX_POINTS = 600


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    """Shown in the legend."""
    points: Sequence[tuple[float, float]]
    """(step, value), steps rising."""
    faint: bool = False
    """Drawn thin and pale, under the others."""


def chart(lines: Sequence[Line], logarithmic: bool = False) -> str:
    """Draw curves over optimizer steps.

    Args:    logarithmic: use a logarithmic axis if all values are above 0.
    Returns: one <svg> element, or a line of text when there is nothing to draw.
    """
    lines = [Line(x.name, thinned(x.points), x.faint) for x in lines if x.points]
    if not lines:
        return "<p>no values</p>"
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    scale = math.log10 if logarithmic and min(ys) > 0 else float
    x_axis, y_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT), _axis_of(ys, scale)
    parts = [_grid(x_axis, y_axis, scale is not float)]
    for number, line in enumerate(lines):
        where = " ".join(
            f"{x_axis.place(x):.1f},{y_axis.place(scale(y)):.1f}" for x, y in line.points
        )
        look = 'stroke-width="0.7" opacity="0.35"' if line.faint else 'stroke-width="1.5"'
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{where}" fill="none" stroke="{colour}" {look}/>')
        if len(line.points) == 1:
            x, y = where.split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>')
        parts.append(_legend(number, line.name, colour))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-size="10">{"".join(parts)}</svg>'
    )


def thinned(
    points: Sequence[tuple[float, float]], limit: int = MAX_POINTS
) -> list[tuple[float, float]]:
    """Average neighbouring points so that at most `limit` are left."""
    group = math.ceil(len(points) / limit)
    if group <= 1:
        return list(points)
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [(_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in parts]


def smoothed(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The mean of the last `width` values at every step."""
    total, found = 0.0, []
    for i, (x, y) in enumerate(points):
        total += y - (points[i - width][1] if i >= width else 0.0)
        found.append((x, total / min(i + 1, width)))
    return found


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low … high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self.start + share * (self.end - self.start)


def _axis_of(values: Sequence[float], scale: object) -> _Axis:
    assert callable(scale)
    low, high = scale(min(values)), scale(max(values))
    margin = 0.04 * (high - low) or 0.5
    return _Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _grid(x_axis: _Axis, y_axis: _Axis, logarithmic: bool) -> str:
    parts = []
    for value in ticks(y_axis.low, y_axis.high):
        y = y_axis.place(value)
        text = f"{10**value if logarithmic else value:.3g}"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{text}</text>'
        )
    for value in ticks(x_axis.low, x_axis.high):
        x = x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:.6g}</text>')
    return "".join(parts)


def _legend(number: int, name: str, colour: str) -> str:
    y = TOP + 12 + 12 * number
    return (
        f'<text x="{WIDTH - RIGHT - 4}" y="{y}" text-anchor="end" fill="{colour}">'
        f"{html.escape(name)}</text>"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
