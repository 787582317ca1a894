"""Problems of rows as people read them: equal ones once, with the lines that have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["LineProblem", "group_problems", "list_lines"]

_MAX_LINES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LineProblem:
    """What is wrong with the row that begins on a line of a file."""

    file: str
    line: int
    text: str


def group_problems(problems: Iterable[LineProblem]) -> list[str]:
    """A sentence each, in the order in which they first occur; of equal ones in a file, one with their lines."""
    lines: dict[tuple[str, str], list[int]] = {}
    for problem in problems:
        lines.setdefault((problem.file, problem.text), []).append(problem.line)
    return [_sentence(file, list(dict.fromkeys(found)), text) for (file, text), found in lines.items()]


def list_lines(lines: Sequence[int]) -> str:
    """`line 3`, or `lines 3, 4 and 5 more`."""
    shown = ", ".join(map(str, lines[:_MAX_LINES_SHOWN]))
    more = f" and {len(lines) - _MAX_LINES_SHOWN} more" if len(lines) > _MAX_LINES_SHOWN else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {shown}{more}"


def _sentence(file: str, lines: Sequence[int], text: str) -> str:
    return f"{file}:{lines[0]}: {text}" if len(lines) == 1 else f"{file}: {list_lines(lines)}: {text}"
