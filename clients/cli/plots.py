"""Loss curves in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapters.methods import Method
from clients.cli.output import console

__all__ = ["print_curves", "print_metrics"]

_COLOURS = {"training": "cyan", "validation": "red"}


def print_curves(folder: Path, method: Method) -> None:
    """Draw the curves of a run's folder."""
    from training.run_log import METRICS_FILE, read_lines

    print_metrics(read_lines(folder / METRICS_FILE), method)


def print_metrics(lines: Iterable[Mapping[str, Any]], method: Method) -> None:
    """Draw the curves of what the method is watched by; of a curve with one point there is nothing to draw."""
    from training.plots import MEASURES, draw_braille, read_curves

    for name, points in read_curves(lines, method).items():
        if len(points) < 2:
            continue
        values = [value for _, value in points]
        steps = f"steps {points[0][0]:.0f} to {points[-1][0]:.0f}"
        console.print(f"{name} {MEASURES[method]}, {min(values):.3f} to {max(values):.3f}, {steps}")
        for line in draw_braille(points):
            console.print(line, style=_COLOURS[name], markup=False)
