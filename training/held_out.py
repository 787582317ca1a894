"""Divides the rows of one source into those that are trained on and those that are held out to validate with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from adapters.chat_rows import Row, row_document
from training.formats import Dataset

__all__ = ["hold_out"]

# The same for all runs, whatever their seed: a version is compared with one that has not seen the held-out rows either.
_SALT = b"hotswap validation share 1\n"
_HASH_BYTES = 8


def hold_out(data: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The rows to train on and the rows held out, in the order of the source; either may have none.

    Which it is follows from a row's content alone: equal rows fall on one side, and more rows move no others. So the
    held-out rows are about that share, not exactly.
    """
    limit = int(share * 256**_HASH_BYTES)
    is_held_out = [_place(numbered.row) < limit for numbered in data.rows]
    kept = tuple(numbered for numbered, is_out in zip(data.rows, is_held_out, strict=True) if not is_out)
    held = tuple(numbered for numbered, is_out in zip(data.rows, is_held_out, strict=True) if is_out)
    return replace(data, rows=kept), replace(data, name=f"{data.name} (held out)", rows=held)


def _place(row: Row) -> int:
    """A row's place among all hashes, evenly spread from 0 on."""
    content = json.dumps(row_document(row), sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(_SALT + content).digest()[:_HASH_BYTES], "big")
