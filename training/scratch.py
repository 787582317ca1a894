"""Folders for what is of no use afterwards: a run's lie beside its metrics, where its home has room for them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["discard_scratch", "make_scratch", "scratch_folder"]

_NAME = "scratch"


@contextmanager
def scratch_folder(run_folder: Path | None) -> Iterator[Path]:
    """An empty folder in a run's own that is gone afterwards; without a run's own, in the system's place for such."""
    if run_folder is not None:
        run_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{_NAME}-", dir=run_folder) as folder:
        yield Path(folder)


def make_scratch(run_folder: Path) -> Path:
    """A folder in a run's own for a whole process and its libraries; `discard_scratch` deletes it."""
    folder = run_folder / _NAME
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def discard_scratch(run_folder: Path) -> None:
    """Delete a run's folders of this kind, also what a killed process has left."""
    for folder in run_folder.glob(f"{_NAME}*"):
        shutil.rmtree(folder, ignore_errors=True)
