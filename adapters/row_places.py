"""Where rows of data stand, and their problems as people read them: equal ones once, with the places that have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters.errors import DataError

__all__ = ["PlacedProblem", "RowPlace", "data_error", "group_problems", "list_places"]

_MAX_PROBLEMS_SHOWN = 20
_MAX_PLACES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where one row of a source is; no two rows of a source have the same.

    Args:
        number: From 1.
        unit: `line`: the row begins on this line of a text file. `row`: it is this row of what has no lines of its own.
        file: The file among several that it lies in; empty where the source is one.
    """

    number: int
    unit: Literal["line", "row"] = "line"
    file: str = ""

    def within(self, name: str) -> str:
        """The place in a source of this name: `tickets.csv:3`, or `tickets.parquet: row 3`; without a name `line 3`."""
        file = self.file or name
        if not file:
            return f"{self.unit} {self.number}"
        return f"{file}:{self.number}" if self.unit == "line" else f"{file}: row {self.number}"


@dataclass(frozen=True, slots=True)
class PlacedProblem:
    """What is wrong with the row at a place. `number` stands in front of the text, where rows differ in it alone."""

    place: RowPlace
    text: str
    number: int | None = None


def group_problems(problems: Iterable[PlacedProblem], name: str) -> list[str]:
    """A sentence each, in the order in which they first occur; of equal ones in a file, one with their places."""
    groups: dict[tuple[str, str], list[PlacedProblem]] = {}
    for problem in problems:
        groups.setdefault((problem.place.file or name, problem.text), []).append(problem)
    return [_sentence(file, group) for (file, _), group in groups.items()]


def list_places(places: Iterable[RowPlace]) -> str:
    """`line 3`, or `lines 3, 4, 5, 6, 7 and 2 more`; of several files `a.csv:3, b.csv:3`."""
    different = list(dict.fromkeys(places))
    if any(place.file for place in different):
        return _list_some([place.within("") for place in different])
    unit = different[0].unit
    return f"{unit if len(different) == 1 else f'{unit}s'} {_list_some([str(place.number) for place in different])}"


def data_error(problems: Sequence[str], *, param: str | None = None) -> DataError:
    """An error that lists the first 20 problems and counts the others."""
    shown = list(problems[:_MAX_PROBLEMS_SHOWN])
    return DataError(shown, num_more=len(problems) - len(shown), param=param)


def _sentence(file: str, group: Sequence[PlacedProblem]) -> str:
    places = list(dict.fromkeys(problem.place for problem in group))
    if len(places) == 1:
        where = places[0].within(file)
    else:
        numbers = list_places([RowPlace(place.number, place.unit) for place in places])
        where = f"{file}: {numbers}" if file else numbers
    return f"{where}: {_amount(group)}{group[0].text}"


def _amount(group: Sequence[PlacedProblem]) -> str:
    numbers = [problem.number for problem in group if problem.number is not None]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return f"{low} " if low == high else f"{low} to {high} "


def _list_some(texts: Sequence[str]) -> str:
    num_more = len(texts) - _MAX_PLACES_SHOWN
    return ", ".join(texts[:_MAX_PLACES_SHOWN]) + (f" and {num_more} more" if num_more > 0 else "")
