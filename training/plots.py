"""Draws the curves of a run, losses or rewards: as an SVG for a browser, and in braille for a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from adapters.methods import SAMPLING_METHODS, Method
from training.run_log import RunLog

__all__ = ["CURVES_FILE", "MEASURES", "Curves", "draw_braille", "draw_svg", "read_curves", "write_curves"]

CURVES_FILE = "loss.svg"
# What the curves of each method show, with its unit. The loss of rloo and grpo says nothing: rewards are what rises.
MEASURES: Mapping[Method, str] = {
    "sft": "loss (nats a token)",
    "dpo": "DPO loss (a pair)",
    "kto": "KTO loss (a row)",
    "reward": "Bradley-Terry loss (a pair)",
    "rloo": "mean reward",
    "grpo": "mean reward",
}
Curves = Mapping[str, Sequence[tuple[float, float]]]

_WIDTH, _HEIGHT, _MARGIN = 720, 360, 56
_COLOURS = ("#4477aa", "#cc3311")
_MAX_POINTS = 2000
_BRAILLE = 0x2800
# The bit of each dot in a braille cell of two columns and four rows, by column and row from above.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def write_curves(log: RunLog, method: Method) -> None:
    """Write a run's curves beside its metrics; of a run that has measured nothing yet there are none."""
    if not (curves := read_curves(log.lines(), method)):
        return
    (log.folder / CURVES_FILE).write_text(draw_svg(curves, title=f"{MEASURES[method]} by step"), encoding="utf-8")


def read_curves(lines: Iterable[Mapping[str, Any]], method: Method) -> dict[str, list[tuple[float, float]]]:
    """What the method is watched by, in training and validation, by step.

    Of metrics as a run writes them, a line a step and a line a validation, or as a job's events hold them, together.
    """
    measure = "mean_reward" if method in SAMPLING_METHODS else "loss"
    curves: dict[str, list[tuple[float, float]]] = {"training": [], "validation": []}
    for line in lines:
        for name, prefix, kind in (("training", "train", "step"), ("validation", "valid", "evaluation")):
            own = line.get(measure) if line.get("kind") == kind else None
            if (value := line.get(f"{prefix}_{measure}", own)) is not None:
                curves[name].append((float(line["step"]), float(value)))
    return {name: points for name, points in curves.items() if points}


def draw_svg(curves: Curves, *, title: str) -> str:
    """A picture with one line a curve, axes with their ends named, and a legend."""
    shown = {name: _thin(points) for name, points in curves.items()}
    (left, right), (low, high) = _bounds(shown)

    def place(x: float, y: float) -> str:
        across = _MARGIN + (x - left) / (right - left) * (_WIDTH - 2 * _MARGIN)
        down = _HEIGHT - _MARGIN - (y - low) / (high - low) * (_HEIGHT - 2 * _MARGIN)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_WIDTH / 2, 24, title, anchor="middle"),
        f'<path d="M{_MARGIN},{_MARGIN} V{_HEIGHT - _MARGIN} H{_WIDTH - _MARGIN}" fill="none" stroke="#888888"/>',
        _text(_MARGIN - 6, _MARGIN + 4, f"{high:.3g}", anchor="end"),
        _text(_MARGIN - 6, _HEIGHT - _MARGIN + 4, f"{low:.3g}", anchor="end"),
        _text(_MARGIN, _HEIGHT - _MARGIN + 20, f"{left:.0f}"),
        _text(_WIDTH - _MARGIN, _HEIGHT - _MARGIN + 20, f"{right:.0f}", anchor="end"),
    ]
    for index, (name, points) in enumerate(shown.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(points) <= 50:  # few enough to be told apart
            parts += [
                f'<circle r="3" cx="{c.split(",")[0]}" cy="{c.split(",")[1]}" fill="{colour}"/>' for c in line.split()
            ]
        parts.append(_text(_WIDTH - _MARGIN, _MARGIN + 18 * index, name, anchor="end", colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def draw_braille(points: Sequence[tuple[float, float]], *, width: int = 60, height: int = 10) -> list[str]:
    """One curve in `height` lines of `width` braille characters, four dots high and two wide each."""
    (left, right), (low, high) = _bounds({"": points})
    cells = [[0] * width for _ in range(height)]
    for x, y in _connect(points, 2 * width):
        column = min(2 * width - 1, int((x - left) / (right - left) * (2 * width - 1) + 0.5))
        row = min(4 * height - 1, int((high - y) / (high - low) * (4 * height - 1) + 0.5))
        cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    return ["".join(chr(_BRAILLE + cell) for cell in line) for line in cells]


def _bounds(curves: Curves) -> tuple[tuple[float, float], tuple[float, float]]:
    xs = [x for points in curves.values() for x, _ in points] or [0.0]
    ys = [y for points in curves.values() for _, y in points] or [0.0]
    return _stretch(min(xs), max(xs)), _stretch(min(ys), max(ys))


def _stretch(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, so that one point has a place in it."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point, and the last: more than the picture has columns can't be seen."""
    every = -(-len(points) // _MAX_POINTS) if points else 1
    return [*points[::every], *(points[-1:] if (len(points) - 1) % every else ())]


def _connect(points: Sequence[tuple[float, float]], num_columns: int) -> Iterable[tuple[float, float]]:
    """The points, and between each two of them as many as make a line."""
    yield from points[:1]
    per_gap = max(1, -(-2 * num_columns // max(1, len(points) - 1)))
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        for part in range(1, per_gap + 1):
            yield x + (next_x - x) * part / per_gap, y + (next_y - y) * part / per_gap


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#333333") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
