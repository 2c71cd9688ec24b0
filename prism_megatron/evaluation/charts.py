"""Line charts as inline SVG: no script, no external resource, legible in print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float | None]]
"""(x, y) in the order of x; where y is None there is no data, and the line has a gap"""

_WIDTH, _HEIGHT = 430, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 34
# Dark enough for print, and told apart by dash as well as by colour.
_STYLES = (("#1f4e79", "none"), ("#b3541e", "7 3"), ("#3d6b35", "2 3"), ("#6a3d7c", "9 3 2 3"))
_SHARE_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_INTERVALS = 4


@dataclass(frozen=True)
class _Scale:
    """Linear map from [low, high] to pixels; where both are equal, to the middle."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        part = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def line_chart(title: str, series: Mapping[str, Points], *, share: bool = False) -> str:
    """A ``<figure>`` with one line for each of at most four series that has data; nothing where none has.

    ``share`` fixes the y axis to 0…1. Raises ValueError for more series.
    """
    if len(series) > len(_STYLES):
        raise ValueError(f"chart {title!r} has {len(series)} series; at most {len(_STYLES)} can be told apart")
    caption = f"<figcaption>{escape(title)}</figcaption>"
    known = [(x, y) for points in series.values() for x, y in points if y is not None and math.isfinite(y)]
    if not known:
        return ""
    xs, ys = [x for x, _ in known], [y for _, y in known]
    x_ticks = _ticks(min(xs), max(xs), smallest=1.0)
    y_ticks = _SHARE_TICKS if share else _ticks(min(ys), max(ys), smallest=0.0)
    to_x = _Scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    to_y = _Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    body = _axes([x for x in x_ticks if min(xs) <= x <= max(xs)], y_ticks, to_x, to_y)
    legend = ""
    for (name, points), (colour, dash) in zip(series.items(), _STYLES, strict=False):
        stroke = f"stroke='{colour}' stroke-width='1.6' stroke-dasharray='{dash}'"
        body += _line(points, colour, stroke, to_x, to_y)
        swatch = f"<svg width='26' height='8'><line x1='0' y1='4' x2='26' y2='4' {stroke}/></svg>"
        legend += f"<span>{swatch} {escape(name)}</span>"
    return (
        f"<figure>{caption}<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(title)}'>{body}</svg>"
        f"<div class='legend'>{legend if len(series) > 1 else ''}</div></figure>"
    )


def has_data(points: Points) -> bool:
    """Whether a line of these would show anything."""
    return any(y is not None and math.isfinite(y) for _, y in points)


def _ticks(low: float, high: float, *, smallest: float) -> tuple[float, ...]:
    """Round numbers 1, 2 or 5 · 10^k apart that enclose [low, high]."""
    wanted = max((high - low) / _INTERVALS, smallest, abs(high) * 1e-6, 1e-9)
    power = 10.0 ** math.floor(math.log10(wanted))
    distance = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return tuple(index * distance for index in range(first, max(last, first + 1) + 1))


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], to_x: _Scale, to_y: _Scale) -> str:
    parts = []
    for y in y_ticks:
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{to_y(y):.1f}' y2='{to_y(y):.1f}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{to_y(y) + 3.5:.1f}' text-anchor='end'>{y:g}</text>")
    y = _HEIGHT - _BOTTOM + 15
    parts.extend(f"<text x='{to_x(x):.1f}' y='{y}' text-anchor='middle'>{x:g}</text>" for x in x_ticks)
    parts.append(f"<text x='{(_LEFT + _WIDTH - _RIGHT) / 2}' y='{_HEIGHT - 4}' text-anchor='middle'>step</text>")
    return "".join(parts)


def _line(points: Points, colour: str, stroke: str, to_x: _Scale, to_y: _Scale) -> str:
    """One path over all stretches with data; a point without neighbours becomes a dot."""
    known = [y is not None and math.isfinite(y) for _, y in points]
    path = dots = ""
    for index, (x, y) in enumerate(points):
        if y is None or not known[index]:
            continue
        goes_on = index > 0 and known[index - 1]
        path += f"{'L' if goes_on else 'M'}{to_x(x):.1f} {to_y(y):.1f}"
        if not goes_on and not (index + 1 < len(points) and known[index + 1]):
            dots += f"<circle cx='{to_x(x):.1f}' cy='{to_y(y):.1f}' r='2.2' fill='{colour}'/>"
    return f"<path d='{path}' fill='none' {stroke}/>{dots}"
