"""What each method asks of a whole set of rows: their kind, and for kto their labels."""

from __future__ import annotations

from collections.abc import Sequence

from adapters.errors import DataError
from adapters.methods import ROW_KINDS, Method
from training.formats import Dataset

__all__ = ["check_kind", "check_labels"]


def check_kind(dataset: Dataset, method: Method) -> None:
    """Refuse rows that a method can't be trained on.

    Raises:
        DataError: names the file, the kind that was found and the methods that would take it.
    """
    if dataset.kind in ROW_KINDS[method]:
        return
    takers = [name for name, kinds in ROW_KINDS.items() if dataset.kind in kinds]
    wanted = " or ".join(ROW_KINDS[method])
    found = f"found {dataset.kind} rows, which are for {', '.join(takers)}"
    raise DataError([f"{dataset.name}: method {method} trains on {wanted} rows, {found}"])


def check_labels(labels: Sequence[bool], name: str) -> None:
    """Refuse rows that give nothing to compare.

    Raises:
        DataError: all rows have one label.
    """
    if len(set(labels)) < 2:
        raise DataError([f"{name}: kto needs rows of both labels, found only {str(labels[0]).lower()}"])
