"""Assignment: published vectors, shares, stickiness and independence between salts."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.assignment import assign_arm, unit_position
from adapters.records import Arm

NUM_UNITS = 10_000
EVEN = (Arm("A", 1, "a" * 64, 50), Arm("B", 2, "b" * 64, 50))
UNEVEN = (Arm("A", 1, "a" * 64, 90), Arm("B", 2, "b" * 64, 9), Arm("C", 3, "c" * 64, 1))
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


def _oracle(salt: str, unit: str) -> Fraction:
    return (
        Fraction(int(hashlib.sha256(f"{len(salt)}:{salt}:{unit}".encode()).hexdigest()[:16], 16) >> 11, 1 << 53) * 100
    )


@pytest.mark.parametrize(
    ("salt", "unit", "expected"),
    [
        ("salt", "alice", 64.051154256400),
        ("salt", "bob", 75.212974245639),
        ("", "", 81.397415999492),
        ("7f3a", "user-42", 29.245444071013),
        ("größe", "用户", 32.470352491998),
    ],
)
def test_unit_position_equals_the_published_vector_when_salt_and_unit_are_given(
    salt: str, unit: str, expected: float
) -> None:
    """A change of the hash would move running experiments' users between arms."""
    assert expected == pytest.approx(unit_position(salt, unit), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_unit_position_equals_exact_arithmetic_when_given_any_texts(salt: str, unit: str) -> None:
    """An independent computation in fractions gives the same position, inside [0, 100)."""
    position = unit_position(salt, unit)
    assert float(_oracle(salt, unit)) == pytest.approx(position, abs=1e-12)
    assert 0 <= position < 100


def test_unit_position_differs_when_the_border_between_salt_and_unit_moves() -> None:
    """Salt and unit don't run together: `a` + `:b` is not `a:` + `b`."""
    assert len({unit_position(*pair) for pair in (("a", "b:c"), ("a:b", "c"), ("a:", "b:c"), ("", "a:b:c"))}) == 4


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_assign_arm_takes_the_stretch_that_holds_the_position_when_weights_vary(
    salt: str, unit: str, cuts: list[int]
) -> None:
    """The arm's cumulated weights enclose the unit's position; an arm of weight 0 gets nobody."""
    edges = [0, *sorted(cuts), 100]
    arms = [Arm(f"a{index}", 1, "a" * 64, high - low) for index, (low, high) in enumerate(pairwise(edges))]
    arm = assign_arm(arms, salt, unit)
    index = arms.index(arm)
    assert edges[index] <= _oracle(salt, unit) < edges[index + 1]


def test_assign_arm_is_the_same_when_asked_again() -> None:
    """A unit stays with its arm, also when the tuple of arms was loaded anew."""
    first = [assign_arm(UNEVEN, "salt", f"user-{index}").name for index in range(200)]
    again = [assign_arm(list(UNEVEN), "salt", f"user-{index}").name for index in range(200)]
    assert first == again


@pytest.mark.parametrize("arms", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_assign_arm_splits_by_weight_when_units_are_many(arms: tuple[Arm, ...]) -> None:
    """Each arm's count lies within four standard deviations of its share."""
    names = [assign_arm(arms, "salt", f"user-{index}").name for index in range(NUM_UNITS)]
    for arm in arms:
        share = arm.weight / 100
        allowed = 4 * (NUM_UNITS * share * (1 - share)) ** 0.5
        assert abs(names.count(arm.name) - NUM_UNITS * share) < allowed


def test_assign_arm_is_independent_when_the_salt_differs() -> None:
    """Of two experiments each cell of the 2 x 2 table holds a quarter of the units."""
    cells = [
        assign_arm(EVEN, "first", f"user-{index}").name + assign_arm(EVEN, "second", f"user-{index}").name
        for index in range(NUM_UNITS)
    ]
    allowed = 4 * (NUM_UNITS * 0.25 * 0.75) ** 0.5
    assert all(abs(cells.count(cell) - NUM_UNITS / 4) < allowed for cell in ("AA", "AB", "BA", "BB"))


def test_assign_arm_skips_empty_arms_when_rounding_leaves_the_end_open() -> None:
    """If weights add up to a hair less than 100, the last arm with any weight takes the rest."""
    arms = (Arm("A", 1, "a" * 64, 0.0), Arm("B", 2, "b" * 64, 1e-12), Arm("C", 3, "c" * 64, 0.0))
    assert assign_arm(arms, "salt", "user").name == "B"
