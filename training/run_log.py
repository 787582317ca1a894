"""The files that every run leaves: what was measured at each step, what the model answered, and the loss curves."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

__all__ = ["METRICS_FILE", "PUBLISHING", "SAMPLES_FILE", "RunLog", "name_run_folder", "read_lines"]

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PUBLISHING = "Publishing"  # the stage from which on there may be a version

LineKind = Literal["step", "evaluation", "alarm", "gate"]


def name_run_folder(home: Path) -> Path:
    """The folder of a new run, which is made when its training begins."""
    return home / "runs" / f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunLog:
    """Appends to `metrics.jsonl` and `samples.jsonl` of a folder, a whole line at a time.

    Args:
        folder: The run's own; made if it is not there.
        resume_step: Lines behind this step are dropped first: those steps are taken again.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in (METRICS_FILE, SAMPLES_FILE):
            _cut(folder / name, resume_step)

    def note(self, kind: LineKind, step: int, values: Mapping[str, Any]) -> None:
        """Append what was measured at a step. What is no finite number is written as null, which JSON knows."""
        _append(self.folder / METRICS_FILE, {"kind": kind, "step": step, **values})

    def note_sample(self, step: int, values: Mapping[str, Any]) -> None:
        """Append an answer that the model gave at a step."""
        _append(self.folder / SAMPLES_FILE, {"step": step, **values})

    def lines(self) -> list[dict[str, Any]]:
        """What was measured so far, in order."""
        return list(read_lines(self.folder / METRICS_FILE))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; none if it is not there. A last line that a kill cut off is left out."""
    if not path.exists():
        return
    for line in path.read_bytes().split(b"\n")[:-1]:  # as bytes: a kill may cut a letter in two
        yield json.loads(line)


def _append(path: Path, document: Mapping[str, Any]) -> None:
    plain = {name: _finite(value) for name, value in document.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, step: int) -> None:
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
