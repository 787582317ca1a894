"""What the benchmark prints: rows with their targets, in Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["TARGETS", "Row", "Target", "format_table", "format_value", "to_document"]

Unit = Literal["x", "ms"]
Met = Literal["stretch", "reach", "no", "-"]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should be: at least, or with `is_limit` at most, `reach`; `stretch` is what would be splendid."""

    reach: float
    stretch: float | None = None
    is_limit: bool = False

    def met(self, value: float) -> Met:
        """The best level that a value meets."""
        if self.stretch is not None and self._holds(value, self.stretch):
            return "stretch"
        return "reach" if self._holds(value, self.reach) else "no"

    def _holds(self, value: float, level: float) -> bool:
        return value <= level if self.is_limit else value >= level


# In the order of the printed table. Rows that are not here come last and have no target.
TARGETS: dict[str, Target | None] = {
    "mixed-1": None,
    "mixed-8": Target(0.80, 0.92),
    "mixed-32": Target(0.80, 0.92),
    "vllm-8": Target(3, 4),
    "vllm-32": Target(3, 5),
    "llama.cpp-8": Target(2, 3),
    "llama.cpp-32": Target(4, 6),
    "vllm-1": Target(3),
    "llama.cpp-1": Target(0.6, 1),
    "peft-mixed": Target(5, 8),
    "peft-switching": Target(8, 12),
    "floor-mixed": Target(2, 1.4, is_limit=True),
    "floor-base": None,
    "cold": Target(50, 15, is_limit=True),
    "slots": Target(3, 1.5, is_limit=True),
    "shell": Target(0.3, 0.1, is_limit=True),
    "shell-paced": None,
    "shell-wall": None,
    "memory": Target(1.3, 1.1, is_limit=True),
    "memory-worker": None,
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure. `key` finds its target; `samples` are the numbers that `value` was made from."""

    key: str
    what: str
    value: float
    unit: Unit
    detail: str
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def target(self) -> Target | None:
        """What the figure should be; a peer that was measured live has the targets of its recorded figures."""
        return TARGETS.get(self.key.removeprefix("live-"))

    @property
    def met(self) -> Met:
        """The best level that the figure meets; a dash where it has no target."""
        return "-" if self.target is None else self.target.met(self.value)


def format_value(value: float | None, unit: Unit) -> str:
    """A ratio with two digits and an x, milliseconds with three significant digits; a dash for None."""
    if value is None:
        return "-"
    if unit == "x" or not math.isfinite(value):
        return f"{value:.2f}{unit}" if unit == "x" else f"{value} {unit}"
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f} {unit}"


def format_table(rows: Sequence[Row]) -> str:
    """The rows in the table's order, as Markdown."""
    lines = ["| what | figure | reach | stretch | met |", "|---|---|---|---|---|"]
    lines += [_format_row(row) for row in _ordered(rows)]
    return "\n".join(lines)


def to_document(rows: Sequence[Row], conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every sample, for a program."""
    documents = []
    for row in _ordered(rows):
        target = asdict(row.target) if row.target else None
        documents.append(asdict(row) | {"target": target, "met": row.met})
    return {"conditions": dict(conditions), "rows": documents}


def _ordered(rows: Sequence[Row]) -> list[Row]:
    places = {key: place for place, key in enumerate(TARGETS)}
    return sorted(rows, key=lambda row: places.get(row.key.removeprefix("live-"), len(places)))


def _format_row(row: Row) -> str:
    target = row.target
    reach, stretch = (target.reach, target.stretch) if target else (None, None)
    figure = f"{format_value(row.value, row.unit)} ({row.detail})"
    cells = [row.what, figure, format_value(reach, row.unit), format_value(stretch, row.unit), row.met]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
