"""Divides the rows of one source into those that are trained on and those that are held out to validate with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

from adapters.chat_rows import Row, row_document
from adapters.errors import DataError
from training.formats import Dataset
from training.gate import MIN_ROWS

__all__ = ["Division", "choose_validation", "divide", "hold_out"]

# The same for all runs, whatever their seed: a version is compared with one that has not seen the held-out rows either.
_SALT = b"hotswap validation share 1\n"
_HASH_BYTES = 8
_NO_VALIDATION = "no validation rows: the gate can't compare; validation_share 0.15 holds 15 % of the rows out"


@dataclass(frozen=True, slots=True)
class Division:
    """The rows of a run by their use.

    Args:
        train: What is trained on.
        validation: What is validated with: a source of its own, or what is held out; None without a row of either.
        num_rows: Of both together.
        warning: What the owner should know of the validation rows before the gate says it, or an empty text.
    """

    train: Dataset
    validation: Dataset | None
    num_rows: int
    warning: str

    @property
    def counts(self) -> str:
        """`12 of 80 rows`: how many are held out."""
        return f"{len(self.validation.rows) if self.validation else 0} of {self.num_rows} rows"


def choose_validation(
    train: Dataset, validation: Dataset | None, share: float | None, *, train_param: str | None = None
) -> Division:
    """The rows of a run by their use: `validation` if it is given, else what `share` holds out of `train`, if it is.

    Raises:
        DataError: the share leaves no row to train on; with `train_param`, the field that named the rows.
    """
    if validation is None and share is not None:
        try:
            return divide(train, share)
        except DataError as error:
            error.param = train_param
            raise
    if validation is None:
        return Division(train, None, len(train.rows), _NO_VALIDATION)
    num_validation = len(validation.rows)
    warning = ""
    if num_validation < MIN_ROWS:
        effect = f"the gate compares with {MIN_ROWS} or more and will be inconclusive: give more"
        warning = f"{validation.name}: rows to validate with: {num_validation}; {effect}"
    return Division(train, validation, len(train.rows) + num_validation, warning)


def divide(data: Dataset, share: float) -> Division:
    """Hold rows out for the validation of a run.

    Raises:
        DataError: none is left to train on.
    """
    train, held_out = hold_out(data, share)
    done = Division(train, held_out if held_out.rows else None, len(data.rows), "")
    if not train.rows:
        message = f"{data.name}: validation_share {share:g} holds out {done.counts}, none is left to train on"
        raise DataError([message])
    if len(held_out.rows) >= MIN_ROWS:
        return done
    warning = (
        f"validation_share {share:g} holds out {done.counts}; the gate compares with {MIN_ROWS} or more and will be "
        "inconclusive: give a larger share, or more rows"
    )
    return replace(done, warning=warning)


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
