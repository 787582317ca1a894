"""Which of a version's training prompts are kept for the router: a bounded sample, the same for the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from adapters.chat_rows import ChatRow, Row, TextRow
from adapters.errors import DataError, InvalidInputError

__all__ = [
    "MAX_CHARS",
    "MAX_KEPT",
    "MIN_ALIASES",
    "clip",
    "group_alike",
    "group_labelled",
    "hash_prompts",
    "prompts_of",
    "read_background",
    "read_labelled",
    "sample_prompts",
]

MAX_KEPT = 300
MAX_CHARS = 1200  # of a text that are kept and read: what one choice may cost is bounded
MIN_ALIASES = 2  # fewer leave nothing to choose between
_ALIKE_SHARE = 0.4  # data that has grown to twice its size still shares about half of its sample with what it was
_END_CHARS = MAX_CHARS // 2
_BACKGROUND = Path(__file__).with_name("background.jsonl")
_MAX_LINES = 1_000_000
_MAX_LINE_BYTES = 1 << 20


def prompts_of(rows: Iterable[Row]) -> list[str]:
    """What users ask in these rows: all that the user says in a conversation; of a plain text its beginning."""
    found = (_prompt_of(row) for row in rows)
    return sample_prompts(prompt for prompt in found if prompt)


def clip(text: str) -> str:
    """The beginning and the end of a long text, 1,200 characters in all: a question may stand at either."""
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - _END_CHARS - 1]} {text[-_END_CHARS:]}"


def sample_prompts(prompts: Iterable[str]) -> list[str]:
    """At most 300 different prompts, of long ones the beginning and the end, chosen and ordered by their hashes."""
    different = {clip(prompt.strip()) for prompt in prompts} - {""}
    return sorted(different, key=lambda prompt: hashlib.sha256(prompt.encode("utf-8", "replace")).digest())[:MAX_KEPT]


def hash_prompts(prompts: Sequence[str]) -> str:
    """SHA-256 over prompts in their order, in hex."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def group_alike(prompts: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    """The aliases by what they are asked: whoever shares much of its prompts with another stands behind it.

    Two versions of one data set under two names are such: no text could be told to belong to one of them.

    Returns:
        Groups in the order of their first aliases, the aliases in the order in which they were given.
    """
    groups: dict[str, list[str]] = {}
    sets = {alias: set(own) for alias, own in prompts.items()}
    for alias, own in sets.items():
        alike = (first for first in groups if _are_alike(own, sets[first]))
        groups.setdefault(next(alike, alias), []).append(alias)
    return [tuple(group) for group in groups.values()]


@cache
def read_background() -> tuple[str, ...]:
    """Texts of no domain, written for this project: questions of all sorts, requests, greetings."""
    lines = _BACKGROUND.read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)


def read_labelled(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines with `text`, `alias` (a name, or null for none) and, perhaps, `paraphrase`.

    Raises:
        DataError: lines that are wrong, by their number.
        InvalidInputError: the file can't be read.
    """
    try:
        return _read_rows(path)
    except OSError as error:
        raise InvalidInputError(f"{path} can't be read: {error.strerror}") from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number in range(1, _MAX_LINES + 1):
            if not (line := file.readline(_MAX_LINE_BYTES + 1)):
                break
            if line.strip():
                row, problem = _read_line(line)
                rows += [row] if not problem else []
                problems += [f"{path}:{number}: {problem}"] if problem else []
    if problems or not rows:
        raise DataError(problems[:20] or [f"{path} holds no rows"], num_more=max(0, len(problems) - 20))
    return rows


def group_labelled(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The texts of each alias in these rows, in the order of the aliases' names.

    Raises:
        DataError: there are fewer than two aliases with different texts.
    """
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["alias"] is not None:
            groups.setdefault(row["alias"], []).append(row["text"])
    if len(group_alike(groups)) < MIN_ALIASES:
        found = ", ".join(groups) or "none"
        raise DataError([f"expected texts of {MIN_ALIASES} aliases or more, not the same for each, found {found}"])
    return dict(sorted(groups.items()))


def _read_line(line: bytes) -> tuple[dict[str, Any], str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    if (
        not isinstance(row, Mapping)
        or not set(row) <= {"text", "alias", "paraphrase"}
        or not {"text", "alias"} <= set(row)
    ):
        return {}, 'expected {"text": ..., "alias": ... or null} and perhaps "paraphrase"'
    is_text = all(isinstance(row[name], str) and row[name].strip() for name in ("text", "paraphrase") if name in row)
    if not is_text or not isinstance(row["alias"], str | None):
        return {}, "expected text in text and paraphrase, a name or null in alias"
    return dict(row), ""


def _are_alike(one: set[str], other: set[str]) -> bool:
    return len(one & other) >= _ALIKE_SHARE * min(len(one), len(other))


def _prompt_of(row: Row) -> str:
    if isinstance(row, TextRow):
        return row.text
    messages = row.messages if isinstance(row, ChatRow) else row.prompt
    return "\n".join(str(message["content"]) for message in messages if message["role"] == "user")
