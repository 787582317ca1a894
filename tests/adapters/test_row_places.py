"""Places of rows: told apart by file and unit; equal problems told once, with what differs in them."""

from __future__ import annotations

import pytest

from adapters.row_places import PlacedProblem, RowPlace, data_error, group_problems, list_places


@pytest.mark.parametrize(
    ("place", "name", "expected"),
    [
        (RowPlace(3), "t.csv", "t.csv:3"),
        (RowPlace(3, "row"), "t.parquet", "t.parquet: row 3"),
        (RowPlace(3, file="d/a.csv"), "d", "d/a.csv:3"),
        (RowPlace(3), "", "line 3"),
    ],
    ids=["line", "row", "file-of-a-folder", "no-name"],
)
def test_row_place_says_what_its_number_counts_when_it_is_told(place: RowPlace, name: str, expected: str) -> None:
    """`file:3` is a line, as editors have it; a row without a line says so."""
    assert expected == place.within(name)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([RowPlace(3)], "line 3"),
        ([RowPlace(3), RowPlace(3), RowPlace(4)], "lines 3, 4"),
        ([RowPlace(n, "row") for n in range(1, 9)], "rows 1, 2, 3, 4, 5 and 3 more"),
        ([RowPlace(3, file="a.csv"), RowPlace(3, file="b.csv")], "a.csv:3, b.csv:3"),
    ],
    ids=["one", "repeated", "many-rows", "several-files"],
)
def test_list_places_names_the_first_and_counts_the_rest_when_there_are_many(
    places: list[RowPlace], expected: str
) -> None:
    """Each place once; the same line of two files is two places."""
    assert expected == list_places(places)


def test_group_problems_tells_equal_ones_once_when_rows_share_them() -> None:
    """In the order of their first rows, a file by itself, with the range of the number in which they differ."""
    found = [
        PlacedProblem(RowPlace(1), "tokens", 30),
        PlacedProblem(RowPlace(2), "is empty"),
        PlacedProblem(RowPlace(4), "tokens", 12),
        PlacedProblem(RowPlace(5, "row"), "alone", 7),
        PlacedProblem(RowPlace(1, file="b"), "tokens", 9),
    ]

    expected = ["a: lines 1, 4: 12 to 30 tokens", "a:2: is empty", "a: row 5: 7 alone", "b:1: 9 tokens"]
    assert expected == group_problems(found, "a")
    assert "lines 1, 4: 12 to 30 tokens" == group_problems(found, "")[0]


def test_data_error_shows_twenty_problems_when_there_are_more() -> None:
    """The rest is counted."""
    error = data_error([f"a:{line}" for line in range(23)], param="data")

    assert [f"a:{line}" for line in range(20)] == error.problems
    assert str(error).endswith("a:19\n... and 3 more")
    assert "data" == error.param
