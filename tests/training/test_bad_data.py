"""The zoo of bad data: each source is refused with a sentence of its own, which says where and what was expected."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest

from adapters.errors import DataError
from tests.support.bad_data import ZOO
from training.formats import read_dataset


def _refusal(case: str, folder: Path) -> DataError:
    bad = ZOO[case]
    path = folder / bad.file
    bad.write(path)
    with pytest.raises(DataError) as caught:
        read_dataset(path, name="SOURCE", **bad.options)
    return caught.value


@pytest.mark.parametrize("case", ZOO)
def test_read_dataset_says_what_is_wrong_when_the_data_is_bad(case: str, tmp_path: Path) -> None:
    """One problem, told by the source's name, the line where there is one, and the field."""
    error = _refusal(case, tmp_path)

    assert 1 == len(error.problems)
    name = "" if ZOO[case].words.startswith("encoding") else "SOURCE"
    assert (name + ZOO[case].words) in error.problems[0]
    assert error.problems[0].startswith(name)


def test_messages_differ_pairwise_when_numbers_and_values_are_left_out(tmp_path: Path) -> None:
    """Each defect has its own sentence."""
    assert len(ZOO) >= 50
    sentences = {}
    for case in ZOO:
        (tmp_path / case).mkdir()
        sentences[case] = re.sub(r"\d+", "N", str(_refusal(case, tmp_path / case)))
    same = [pair for pair in combinations(ZOO, 2) if sentences[pair[0]] == sentences[pair[1]]]
    assert [] == same
