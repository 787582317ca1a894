"""What each method asks of a whole set of rows: their kind, for kto their labels, for rloo and grpo their number."""

from __future__ import annotations

from collections.abc import Sequence

from adapters.errors import DataError
from adapters.methods import ROW_KINDS, Method
from training.config import TrainSettings
from training.formats import Dataset

__all__ = ["check_kind", "check_labels", "check_prompts", "count_prompts_a_step"]


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


def count_prompts_a_step(settings: TrainSettings) -> int:
    """How many prompts a step of rloo or grpo takes: its answers come in groups, one for each prompt."""
    return settings.batch_size * settings.gradient_accumulation // settings.generations


def check_prompts(num_prompts: int, name: str, settings: TrainSettings) -> None:
    """Refuse fewer prompts than one step of rloo or grpo takes: no step would ever be made.

    Raises:
        DataError: says how many a step takes, and what makes it take fewer.
    """
    needed = count_prompts_a_step(settings)
    if num_prompts < needed:
        takes = f"a step of {settings.method} takes {needed} prompts (batch_size * gradient_accumulation / generations)"
        cure = "give more rows, a smaller batch_size or more generations"
        raise DataError([f"{name}: number of rows: {num_prompts}; {takes}: {cure}"])
