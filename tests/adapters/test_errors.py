"""The tree of errors, and that its drawing is the tree."""

from __future__ import annotations

import inspect
import re

from adapters import errors
from adapters.errors import (
    AdapterRejectedError,
    DataError,
    FingerprintMismatchError,
    HotswapError,
    InvalidInputError,
    OverloadedError,
    RankTooHighError,
)


def _drawn_parents() -> dict[str, str]:
    """Class -> parent as the module's docstring draws them."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"\s*(?P<indent>[| ]*)(?P<branch>\|- )?(?P<name>[A-Z]\w+Error)\b", line):
            branch = line.find("|- ")
            depth = 0 if branch < 0 else 1 + (branch - line.index("|")) // 3
            path[depth:] = [match["name"]]
            if depth:
                parents[match["name"]] = path[depth - 1]
    return parents


def test_drawn_tree_equals_the_classes_when_read_from_the_docstring() -> None:
    """Every error stands in the drawing, below the class that it derives from."""
    classes = {
        name: found.__bases__[0].__name__
        for name, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, HotswapError) and found is not HotswapError
    }
    assert len(classes) > 10
    assert classes == _drawn_parents()


def test_all_lists_every_error_when_the_module_defines_it() -> None:
    """No error is forgotten in `__all__`."""
    defined = {name for name, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, Exception)}
    assert defined == set(errors.__all__)


def test_invalid_input_error_keeps_the_field_when_given() -> None:
    """The field at fault travels beside the message."""
    error = InvalidInputError("too long", param="messages")
    assert (str(error), error.param) == ("too long", "messages")
    assert InvalidInputError("too long").param is None


def test_data_error_counts_the_rest_when_not_all_problems_are_shown() -> None:
    """Each problem has a line, and what is left out is counted."""
    error = DataError(["a:1: x", "a:2: y"], num_more=3)
    assert str(error) == "a:1: x\na:2: y\n... and 3 more"
    assert error.problems == ["a:1: x", "a:2: y"]
    assert str(DataError(["a:1: x"])) == "a:1: x"


def test_mismatch_errors_name_both_values_when_raised() -> None:
    """A reader sees what was found and what was expected."""
    fingerprints = FingerprintMismatchError(adapter="a" * 64, base="b" * 64)
    assert "a" * 64 in str(fingerprints)
    assert "b" * 64 in str(fingerprints)
    rank = RankTooHighError(rank=64, max_rank=16)
    assert "rank 64" in str(rank)
    assert "rank 16" in str(rank)
    assert isinstance(rank, AdapterRejectedError)


def test_overloaded_error_says_when_to_retry_when_asked() -> None:
    """The wait is a second unless told otherwise."""
    assert (OverloadedError("full").retry_after_s, OverloadedError("full", retry_after_s=7).retry_after_s) == (1, 7)
