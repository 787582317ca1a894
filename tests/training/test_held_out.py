"""Rows that are held out to validate with: which ones, and that nothing but their content decides it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters.errors import DataError
from tests.support.conversations import easy_rows, make_dataset, make_messages
from training.formats import Dataset
from training.held_out import choose_validation, hold_out


def _numbered(num_rows: int) -> list[list[dict[str, str]]]:
    return [make_messages(f"Question {index}", f"Answer {index}") for index in range(num_rows)]


def _rows(data: Dataset) -> list[Any]:
    return [numbered.row for numbered in data.rows]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_hold_out_gives_each_row_to_one_side_when_it_divides(tmp_path: Path, share: float) -> None:
    """About the share is held out; nothing is lost, nothing stands on both sides, the order and the lines stay."""
    data = make_dataset(tmp_path / "rows.jsonl", _numbered(2000))
    train, held_out = hold_out(data, share)
    assert sorted((*train.rows, *held_out.rows), key=lambda numbered: numbered.place.number) == list(data.rows)
    assert not set(map(str, _rows(train))) & set(map(str, _rows(held_out)))
    assert share * 2000 == pytest.approx(len(held_out.rows), rel=0.2)
    assert (data.name, data.sha256) == (train.name, train.sha256)


def test_hold_out_moves_no_row_when_rows_are_added_or_reordered(tmp_path: Path) -> None:
    """What was held out of a file is held out of a longer one, too: later versions are compared on unseen rows."""
    rows = _numbered(300)
    _, before = hold_out(make_dataset(tmp_path / "before.jsonl", rows[:200]), 0.2)
    longer, after = hold_out(make_dataset(tmp_path / "after.jsonl", rows[::-1]), 0.2)
    assert {str(row) for row in _rows(before)} < {str(row) for row in _rows(after)}
    assert not {str(row) for row in _rows(before)} & {str(row) for row in _rows(longer)}


def test_hold_out_keeps_equal_rows_together_when_a_file_repeats_them(tmp_path: Path) -> None:
    """A repeated row is never both trained on and validated with."""
    data = make_dataset(tmp_path / "rows.jsonl", [row for row in easy_rows(50) for _ in range(3)])
    train, held_out = hold_out(data, 0.3)
    assert len(held_out.rows) % 3 == len(train.rows) % 3 == 0
    assert held_out.rows


def test_hold_out_is_the_same_when_it_is_computed_again_by_another_release(tmp_path: Path) -> None:
    """A job that goes on after an update, and a version that is trained next year, hold out these very rows."""
    _, held_out = hold_out(make_dataset(tmp_path / "rows.jsonl", _numbered(40)), 0.25)
    assert [numbered.place.number for numbered in held_out.rows] == [9, 10, 11, 20, 23, 25, 28, 29, 30, 36, 37, 40]


@pytest.mark.parametrize(("num_rows", "is_warned"), [(7, True), (8, False)])
def test_choose_validation_warns_when_a_file_has_too_few_rows_for_the_gate(
    tmp_path: Path, num_rows: int, is_warned: bool
) -> None:
    """The share is for runs without such a file: nothing is held out beside it."""
    train = make_dataset(tmp_path / "rows.jsonl", _numbered(20))
    given = make_dataset(tmp_path / "v.jsonl", _numbered(num_rows))
    division = choose_validation(train, given, 0.5)
    assert (division.train, division.validation) == (train, given)
    assert is_warned == bool(division.warning)
    assert is_warned == division.warning.endswith(
        "v.jsonl: rows to validate with: 7; the gate compares with 8 or more and will be inconclusive: give more"
    )


def test_choose_validation_names_the_field_when_the_share_leaves_no_row(tmp_path: Path) -> None:
    """A client learns which of its files was at fault."""
    one = next([row] for row in _numbered(50) if hold_out(make_dataset(tmp_path / "r.jsonl", [row]), 0.5)[1].rows)
    with pytest.raises(DataError, match="none is left to train on") as caught:
        choose_validation(make_dataset(tmp_path / "r.jsonl", one), None, 0.5, train_param="training_file")
    assert "training_file" == caught.value.param
