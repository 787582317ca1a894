"""Orders by length: every row once, little padding, and the same order for the same seed and epoch."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.length_order import LengthSampler, grouped_order, padding_share


def _order(lengths: list[int], batch_size: int, seed: int = 0) -> list[int]:
    return grouped_order(lengths, batch_size, torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 500), max_size=80), st.integers(1, 9), st.integers(0, 100))
def test_order_holds_every_row_once_when_rows_are_grouped(lengths: list[int], batch_size: int, seed: int) -> None:
    """And no more padding than the worst row of a batch makes."""
    order = _order(lengths, batch_size, seed)
    assert list(range(len(lengths))) == sorted(order)
    if lengths:
        assert 0 <= padding_share(lengths, order, batch_size) < 1


def test_padding_is_bounded_when_lengths_differ_widely() -> None:
    """Lengths from 10 to 1000, as chat data has them: shuffled, more than half of each batch would be padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = (10 * 100 ** torch.rand(1000, generator=generator)).int().tolist()
    shuffled = torch.randperm(1000, generator=generator).tolist()
    assert padding_share(lengths, shuffled, 8) > 0.5
    assert padding_share(lengths, _order(lengths, 8), 8) < 0.25


def test_padding_share_counts_what_a_batch_adds_when_its_rows_are_unequal() -> None:
    """Two rows of 4 and 2 make 8 places, of which 2 are padding; a batch of its own makes none."""
    assert 0.25 == padding_share([4, 2], [0, 1], 2)
    assert 0.0 == padding_share([4, 2], [0, 1], 1)


def test_epochs_differ_and_come_again_when_they_are_set() -> None:
    """A run that goes on from a checkpoint sets the epoch and sees that epoch's order."""
    lengths = [n % 17 + 1 for n in range(50)]
    sampler = LengthSampler(lengths, batch_size=4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    again = LengthSampler(lengths, batch_size=4, seed=3)
    again.set_epoch(1)
    assert first != second
    assert second == list(again)
    assert 50 == len(sampler)


def test_the_rest_is_drawn_when_rows_make_no_whole_batch() -> None:
    """The shortest rows must not be the last ones each time: which rows the last batch holds changes with the seed."""
    lengths = list(range(1, 11))
    lasts = {tuple(sorted(_order(lengths, 4, seed)[8:])) for seed in range(20)}
    assert len(lasts) > 5
