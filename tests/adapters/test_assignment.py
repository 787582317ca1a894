"""Assignment: published vectors, shares, stickiness and independence between salts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.assignment import (
    allot_traffic,
    assign_arm,
    is_held_out,
    length_of,
    shift_weights,
    traffic_position,
    unit_position,
)
from adapters.records import Arm, Stretch

NUM_UNITS = 10_000
UNITS = [f"user-{index}" for index in range(NUM_UNITS)]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
WEIGHTS = st.lists(st.integers(1, 1000), min_size=2, max_size=6)


def _arms(weights: Mapping[str, float], owned: Mapping[str, Sequence[Stretch]] | None = None) -> list[Arm]:
    """Arms with the stretches that they get from those before."""
    stretches = shift_weights(owned or {}, weights)
    return [Arm(name, 1, "a" * 64, weight, stretches[name]) for name, weight in weights.items()]


def _owned(arms: Sequence[Arm]) -> dict[str, Sequence[Stretch]]:
    return {arm.name: arm.stretches for arm in arms}


def _normal(parts: Sequence[int], names: str = "ABCDEFGH") -> dict[str, float]:
    """Any positive numbers as weights that add up to 100."""
    return {name: 100 * part / sum(parts) for name, part in zip(names, parts, strict=False)}


EVEN = _arms({"A": 50, "B": 50})
UNEVEN = _arms({"A": 90, "B": 9, "C": 1})


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


@pytest.mark.parametrize(
    ("user", "traffic", "holdout", "position", "arm"),
    [
        ("ann@example.com", 43.052716750342, 91.126803523084, 46.946898894661, "A"),
        ("bob@example.com", 30.566565614446, 28.876971356719, 83.995834432974, "B"),
        ("user-42", 87.740375298784, 58.223074583317, 83.424499850921, "B"),
        ("用户", 55.158937773243, 96.943925269334, 55.618926089241, "B"),
    ],
)
def test_assignment_equals_the_published_vectors_when_a_user_is_given(
    user: str, traffic: float, holdout: float, position: float, arm: str
) -> None:
    """What docs/experiments.md publishes for the alias `support` and the salt `hotswap`, half and half."""
    unit = hashlib.sha256(user.encode()).hexdigest()[:32]
    assert traffic == pytest.approx(traffic_position("support", unit), abs=1e-9)
    assert (True, False) == tuple(is_held_out("support", holdout + nudge, unit) for nudge in (1e-9, -1e-9))
    assert position == pytest.approx(unit_position("hotswap", unit), abs=1e-9)
    assert arm == assign_arm(EVEN, "hotswap", unit).name


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, WEIGHTS)
def test_assign_arm_takes_the_stretch_that_holds_the_position_when_weights_vary(
    salt: str, unit: str, parts: list[int]
) -> None:
    """At first the arms lie one behind the other: the cumulated weights enclose the unit's position."""
    arms = _arms(_normal(parts))
    arm = assign_arm(arms, salt, unit)
    before = sum(other.weight for other in arms[: arms.index(arm)])
    position = float(_oracle(salt, unit))
    assert before - 1e-6 <= position < before + arm.weight + 1e-6


@settings(max_examples=300, deadline=None)
@given(st.lists(WEIGHTS, min_size=1, max_size=5))
def test_shift_weights_gives_everybody_their_weight_when_they_change_again_and_again(changes: list[list[int]]) -> None:
    """All of [0, 100) belongs to exactly one arm, whatever came before, and every arm has what it was promised."""
    owned: dict[str, Sequence[Stretch]] = {}
    for parts in changes:
        weights = _normal(parts)
        owned = dict(shift_weights(owned, weights))
        for name, weight in weights.items():
            assert weight == pytest.approx(length_of(owned[name]), abs=1e-4)
        stretches = sorted(stretch for mine in owned.values() for stretch in mine)
        assert [0.0, *(high for _, high in stretches)] == [*(low for low, _ in stretches), 100.0]


@settings(max_examples=200, deadline=None)
@given(WEIGHTS, WEIGHTS)
def test_shift_weights_moves_no_more_than_it_must_when_weights_change(before: list[int], after: list[int]) -> None:
    """What changes hands is what arms lose in all: nobody's share goes from one that keeps its weight to another."""
    first, second = _normal(before), _normal(after)
    old = shift_weights({}, first)
    new = shift_weights(old, second)
    kept = sum(_common(old[name], new[name]) for name in first if name in new)
    lost = sum(max(0.0, weight - second.get(name, 0.0)) for name, weight in first.items())
    assert 100 - lost == pytest.approx(kept, abs=1e-4)


def _common(first: Sequence[Stretch], second: Sequence[Stretch]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def test_added_arm_takes_its_share_and_nothing_else_moves_when_the_others_shrink() -> None:
    """No unit goes from one old arm to another, and the new arm's share lies within binomial error."""
    before = _arms({"A": 50, "B": 50})
    after = _arms({"A": 40, "B": 40, "C": 20}, _owned(before))
    moves = Counter((assign_arm(before, "salt", unit).name, assign_arm(after, "salt", unit).name) for unit in UNITS)
    assert {("A", "A"), ("B", "B"), ("A", "C"), ("B", "C")} == set(moves)
    share = (moves["A", "C"] + moves["B", "C"]) / NUM_UNITS
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / NUM_UNITS) ** 0.5


def test_units_have_the_arm_that_they_had_when_a_change_is_taken_back() -> None:
    """To 90/10 and back to 50/50: who came last to the other arm goes back first."""
    before = _arms({"A": 50, "B": 50})
    between = _arms({"A": 90, "B": 10}, _owned(before))
    assert before == _arms({"A": 50, "B": 50}, _owned(between))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 40), st.floats(0, 99.9)), min_size=1, max_size=6),
    st.floats(0.01, 100),
    st.floats(0, 99.9),
)
def test_allot_traffic_overlaps_nobody_when_there_is_room(
    others: list[tuple[float, float]], percent: float, start: float
) -> None:
    """Experiments are exclusive, and each gets what it asked for, or nothing if that isn't there."""
    taken: list[Stretch] = []
    for share, place in others:
        taken += allot_traffic((), taken, share, start=place) or ()
    found = allot_traffic((), taken, percent, start=start)
    if found is None:
        assert length_of(taken) + percent > 100
        return
    assert percent == pytest.approx(length_of(found), abs=1e-4)
    assert 0 == pytest.approx(_common(found, taken), abs=1e-4)


def test_allot_traffic_keeps_what_there_is_when_it_grows_or_shrinks() -> None:
    """More traffic adds units and takes none out; less takes the last ones."""
    first = allot_traffic((), [(0.0, 30.0)], 20, start=90.0)
    assert ((30.0, 40.0), (90.0, 100.0)) == first
    grown = allot_traffic(first, [(0.0, 30.0)], 40, start=0.0)
    assert ((30.0, 60.0), (90.0, 100.0)) == grown
    assert ((30.0, 40.0),) == allot_traffic(first, [(0.0, 30.0)], 10, start=0.0)
    assert allot_traffic(first, [(0.0, 30.0)], 71, start=0.0) is None


def test_held_out_units_stay_so_when_the_holdout_grows() -> None:
    """The share is as promised, and says nothing about traffic or arms."""
    held = [unit for unit in UNITS if is_held_out("legal", 20, unit)]
    assert all(is_held_out("legal", 30, unit) for unit in held)
    assert abs(len(held) - NUM_UNITS * 0.2) < 4 * (NUM_UNITS * 0.2 * 0.8) ** 0.5
    low = sum(traffic_position("legal", unit) < 50 for unit in held)
    assert abs(low - len(held) / 2) < 4 * (len(held) / 4) ** 0.5
    assert held != [unit for unit in UNITS if is_held_out("medical", 20, unit)]


def test_assign_arm_is_the_same_when_asked_again() -> None:
    """A unit stays with its arm, also when the tuple of arms was loaded anew."""
    first = [assign_arm(UNEVEN, "salt", f"user-{index}").name for index in range(200)]
    again = [assign_arm(list(UNEVEN), "salt", f"user-{index}").name for index in range(200)]
    assert first == again


@pytest.mark.parametrize("arms", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_assign_arm_splits_by_weight_when_units_are_many(arms: Sequence[Arm]) -> None:
    """Each arm's count lies within four standard deviations of its share."""
    names = [assign_arm(arms, "salt", unit).name for unit in UNITS]
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
