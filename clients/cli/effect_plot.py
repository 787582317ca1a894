"""Draws an effect and its interval by the number of users: in characters for a terminal, as SVG for a browser.

Knows numbers alone. The interval is a band; the line at zero is what it has to leave for a difference to be shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

__all__ = ["EffectPoint", "draw_effect", "draw_effects_svg"]

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 64
_COLOURS = ("#4477aa", "#cc3311", "#228833", "#aa3377", "#66ccee")
_MAX_WIDENING = 4.0
_LABEL_CHARS = 9


@dataclass(frozen=True, slots=True)
class EffectPoint:
    """An estimate and its interval after so many users."""

    num_units: int
    estimate: float
    low: float
    high: float


def draw_effect(points: Sequence[EffectPoint], *, width: int = 60, height: int = 12) -> list[str]:
    """One effect as lines of text: the interval `░`, the estimate `●`, zero `┄`, with a scale at the left and below."""
    low, high = _bounds(points)
    rows = [_row(value, low, high, height) for value in (0.0, high, low)]
    zero = rows[0]
    columns = [_column(point, low, high, height, zero) for point in _spread(points, width)]
    labels = {0: f"{high:+.3g}", height - 1: f"{low:+.3g}", zero: "0"}
    lines = [
        f"{labels.get(row, ''):>{_LABEL_CHARS}} │" + "".join(column[row] for column in columns) for row in range(height)
    ]
    first, last = f"{points[0].num_units:,}", f"{points[-1].num_units:,} users"
    return [
        *lines,
        " " * (_LABEL_CHARS + 1) + "└" + "─" * width,
        " " * (_LABEL_CHARS + 2) + first + last.rjust(width - len(first)),
    ]


def draw_effects_svg(effects: Mapping[str, Sequence[EffectPoint]], *, title: str) -> str:
    """A picture with a band and a line for each effect, zero as a dashed line, axes with their ends named, a legend."""
    everything = [point for points in effects.values() for point in points]
    low, high = _bounds(everything)
    left = min(point.num_units for point in everything)
    right = max(left + 1, *(point.num_units for point in everything))

    def place(num_units: int, value: float) -> str:
        across = _MARGIN + (num_units - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        share = (min(max(value, low), high) - low) / (high - low)
        return f"{across:.1f},{_HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN):.1f}"

    zero_left, zero_right = place(left, 0.0), place(right, 0.0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_WIDTH / 2, 24, title, anchor="middle"),
        f'<path d="M{_MARGIN},{_MARGIN} V{_HEIGHT - _MARGIN} H{_WIDTH - _MARGIN}" fill="none" stroke="#888888"/>',
        f'<polyline points="{zero_left} {zero_right}" fill="none" stroke="#888888" stroke-dasharray="5 4"/>',
        _text(_MARGIN - 6, float(zero_left.split(",")[1]) + 4, "0", anchor="end"),
        _text(_MARGIN - 6, _MARGIN + 4, f"{high:+.3g}", anchor="end"),
        _text(_MARGIN - 6, _HEIGHT - _MARGIN + 4, f"{low:+.3g}", anchor="end"),
        _text(_MARGIN, _HEIGHT - _MARGIN + 20, f"{left:,} users"),
        _text(_WIDTH - _MARGIN, _HEIGHT - _MARGIN + 20, f"{right:,} users", anchor="end"),
    ]
    for index, (name, points) in enumerate(effects.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        upper = [place(point.num_units, point.high) for point in points]
        lower = [place(point.num_units, point.low) for point in reversed(points)]
        line = " ".join(place(point.num_units, point.estimate) for point in points)
        parts += [
            f'<polygon points="{" ".join([*upper, *lower])}" fill="{colour}" fill-opacity="0.18"/>',
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
            _text(_WIDTH - _MARGIN, _MARGIN + 18 * index, name, anchor="end", colour=colour),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _bounds(points: Sequence[EffectPoint]) -> tuple[float, float]:
    """The values that are drawn: zero and all of the last intervals, and of the first, far wider ones a part."""
    last = max(point.num_units for point in points)
    final = [point for point in points if point.num_units == last]
    reach = _MAX_WIDENING * max(point.high - point.low for point in final)
    middle = final[-1].estimate
    low = max(min(0.0, *(point.low for point in points)), min(0.0, middle - reach))
    high = min(max(0.0, *(point.high for point in points)), max(0.0, middle + reach))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _row(value: float, low: float, high: float, height: int) -> int:
    """The line of text, from above, that shows a value; one out of bounds is shown at the edge."""
    share = (high - min(max(value, low), high)) / (high - low)
    return min(height - 1, int(share * height))


def _column(point: EffectPoint | None, low: float, high: float, height: int, zero: int) -> list[str]:
    cells = ["┄" if row == zero else " " for row in range(height)]
    if point is not None:
        for row in range(_row(point.high, low, high, height), _row(point.low, low, high, height) + 1):
            cells[row] = "░" if row != zero else "┄"
        cells[_row(point.estimate, low, high, height)] = "●"
    return cells


def _spread(points: Sequence[EffectPoint], width: int) -> list[EffectPoint]:
    """The point that holds at each column: the last one with no more users than the column stands for."""
    left, right = points[0].num_units, points[-1].num_units
    spread, index = [], 0
    for column in range(width):
        num_units = left + (right - left) * column / max(1, width - 1)
        while index + 1 < len(points) and points[index + 1].num_units <= num_units:
            index += 1
        spread.append(points[index])
    return spread


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#333333") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
