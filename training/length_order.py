"""Orders of rows in which those of one batch are about equally long, so that little of a padded batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthSampler", "grouped_order", "padding_share"]

# Rows are sorted within so many batches at a time: with more, the same rows would meet in each epoch.
_POOL_BATCHES = 8


class LengthSampler(Sampler[int]):
    """Each epoch's order, drawn from the seed and the epoch's number alone.

    A run that goes on from a checkpoint in a later epoch sees the order that it would have seen.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch.
        seed: What orders are drawn from.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, also by a run that begins in its middle."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(grouped_order(self._lengths, self._batch_size, generator))

    def __len__(self) -> int:
        return len(self._lengths)


def grouped_order(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """Every row's number once, so that each `batch_size` of them, one behind the other, are about equally long.

    Rows are shuffled, sorted within pools of eight batches, and the batches are shuffled. What makes no whole batch
    comes last, and is drawn like the rest: not always the shortest rows.
    """
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    num_whole = len(order) - len(order) % batch_size
    batches: list[list[int]] = []
    pool_size = batch_size * _POOL_BATCHES
    for start in range(0, num_whole, pool_size):
        pool = sorted(order[start : min(start + pool_size, num_whole)], key=lambda number: lengths[number])
        batches += [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [number for index in shuffled for number in batches[index]] + order[num_whole:]


def padding_share(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """The share of a run's batches that is padding, 0 to 1, if rows are taken in this order."""
    batches = [[lengths[number] for number in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return 1 - sum(map(sum, batches)) / sum(len(batch) * max(batch) for batch in batches)
