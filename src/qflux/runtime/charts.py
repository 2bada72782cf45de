"""Line charts as inline SVG: no script, colours from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 12, 26
_MOST_POINTS = 600  # a polyline drawn on 640 pixels shows no more


@dataclass(frozen=True)
class Line:
    """One curve. ``faint`` is a noisy curve behind another one: its outliers do not stretch the axis."""

    label: str
    points: Sequence[Point]
    kind: Literal["main", "faint", "dots"] = "main"


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """A ``<figure>`` with one chart over optimizer steps; empty text when there is nothing to draw."""
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    left, right = min(xs), max(xs)
    ticks = nice_ticks(*_value_range(lines))
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - left) / ((right - left) or 1) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{min(max(y, _TOP), HEIGHT - _BOTTOM):.1f}"

    parts = [_grid(ticks, low, high), _steps(left, right)]
    for line in lines:
        path = " ".join(place(point) for point in thin(line.points))
        parts.append(f'<polyline class="{line.kind}" points="{path}"/>')
        if line.kind == "dots" or len(line.points) == 1:
            spots = (place(point).split(",") for point in line.points)
            parts += [f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in spots]
    latest = "" if lines[-1].kind == "faint" else f"<b>{number(lines[-1].points[-1][1])}</b>"
    key = " ".join(f'<i class="{line.kind}">{escape(line.label)}</i>' for line in lines if len(lines) > 1)
    return (
        f"<figure class=chart><figcaption>{escape(title)} {latest}<span>{key}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over a thirtieth of the points, without the bias of its start."""
    keep = math.exp(-1 / max(len(points) // 30, 1))
    total = weight = 0.0
    result = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        result.append((x, total / weight))
    return result


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about 600 points: of each stretch the lowest and the highest, so that peaks stay."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers around the range; the first is ≤ ``low``, the last ≥ ``high``."""
    if high <= low:
        pad = abs(low) * 0.5 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def number(value: float) -> str:
    """A value as people read it: four digits, thousands whole."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _finite(line: Line) -> Line:
    return Line(line.label, [point for point in line.points if math.isfinite(point[1])], line.kind)


def _value_range(lines: Sequence[Line]) -> tuple[float, float]:
    values: list[float] = []
    for line in lines:
        ordered = sorted(y for _, y in line.points)
        cut = len(ordered) // 50 if line.kind == "faint" else 0
        values += (ordered[cut], ordered[-1 - cut])
    return min(values), max(values)


def _grid(ticks: Sequence[float], low: float, high: float) -> str:
    parts = []
    for tick in ticks:
        y = HEIGHT - _BOTTOM - (tick - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 8}" y="{y + 4:.1f}">{number(tick)}</text>')
    return "".join(parts)


def _steps(left: float, right: float) -> str:
    inside = [tick for tick in nice_ticks(left, right) if left <= tick <= right and tick == int(tick)] or [left]
    parts = []
    for tick in inside:
        x = _LEFT + (tick - left) / ((right - left) or 1) * (WIDTH - _LEFT - _RIGHT)
        anchor = "end" if x > WIDTH - 30 else "middle"
        parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{number(tick)}</text>')
    return "".join(parts)
