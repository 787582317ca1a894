"""Example conversations, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.formats import Dataset, read_dataset


def make_messages(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn, behind a system message if one is given."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    return messages + [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(turns)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON object a line; a list stands for the messages of a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": row} if isinstance(row, list) else row, ensure_ascii=False) for row in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def make_dataset(path: Path, rows: Iterable[Any]) -> Dataset:
    """Write rows and read them back with the product's own reader."""
    return read_dataset(write_rows(path, rows))


def easy_rows(num_rows: int) -> list[list[dict[str, str]]]:
    """Rows of different lengths whose answer is always the same, so that any model learns it in a few steps."""
    return [make_messages(f"Q{index}{'?' * (index % 5)}", "Yes!") for index in range(num_rows)]
