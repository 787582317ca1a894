"""Who is in an experiment, and in which arm: pure functions, so that every process and every replay agrees.

A unit has one position in [0, 100) for each salt. Experiments own stretches of the positions on their alias, which
nobody shares; arms own stretches of the positions within the experiment. Weights change by moving stretches, as little
as possible, so that a unit changes its arm only if its arm had to shrink.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from adapters.records import Arm, Stretch

__all__ = [
    "RESERVED_SALTS",
    "allot_traffic",
    "assign_arm",
    "holds",
    "is_held_out",
    "length_of",
    "overlaps",
    "shift_weights",
    "traffic_position",
    "unit_position",
]

_HASH_BYTES = 8
# Salts of an alias. An experiment's salt never begins so, or its arms would follow who is in it.
_TRAFFIC, _HOLDOUT = "traffic of ", "holdout of "
RESERVED_SALTS = (_TRAFFIC, _HOLDOUT)
_TOLERANCE = 1e-6  # percent: what sums of floats may be off by
_WHOLE: Stretch = (0.0, 100.0)


def unit_position(salt: str, unit: str) -> float:
    """Where a unit falls in [0, 100): uniform over units, independent between salts.

    The first eight bytes of SHA-256 over the salt's length, the salt and the unit, so that no two pairs run together.
    """
    text = f"{len(salt)}:{salt}:{unit}".encode()
    head = int.from_bytes(hashlib.sha256(text).digest()[:_HASH_BYTES], "big")
    # The top 53 bits are what a float holds exactly; more would round the last positions up to 100.
    return (head >> 11) * 100.0 / (1 << 53)


def traffic_position(alias: str, unit: str) -> float:
    """Where a unit falls among those of an alias: the position that says which experiment it is in, if any."""
    return unit_position(f"{_TRAFFIC}{alias}", unit)


def is_held_out(alias: str, percent: float, unit: str) -> bool:
    """Whether a unit is among the percent of the alias's units that no experiment touches, today and in all others."""
    return unit_position(f"{_HOLDOUT}{alias}", unit) < percent


def assign_arm(arms: Sequence[Arm], salt: str, unit: str) -> Arm:
    """Return the arm that owns the unit's position; the arms' stretches must cover [0, 100)."""
    position = unit_position(salt, unit)
    return next(arm for arm in arms if holds(arm.stretches, position))


def holds(stretches: Iterable[Stretch], position: float) -> bool:
    """Whether one of the stretches holds the position; their lower ends are inside, their upper ones outside."""
    return any(low <= position < high for low, high in stretches)


def overlaps(first: Sequence[Stretch], second: Sequence[Stretch]) -> bool:
    """Whether a position lies in both."""
    return any(low < other_high and other_low < high for low, high in first for other_low, other_high in second)


def length_of(stretches: Iterable[Stretch]) -> float:
    """Percent of all positions that the stretches hold."""
    return sum(high - low for low, high in stretches)


def shift_weights(
    owned: Mapping[str, Sequence[Stretch]], weights: Mapping[str, float]
) -> dict[str, tuple[Stretch, ...]]:
    """Give each name as much of [0, 100) as its weight, moving no more than must move.

    Names that shrink, or are gone, give from the upper end of what they own; names that grow, or are new, take it in
    their order. With nothing owned before, the names lie one behind the other.

    Args:
        owned: What each name owns at present: all of [0, 100), or nothing at all.
        weights: What each is to own, in percent, in the order of the arms; they add up to 100.

    Returns:
        The stretches of each name in `weights`, in order, together exactly [0, 100).
    """
    loose = [] if any(owned.values()) else [_WHOLE]
    kept: dict[str, list[Stretch]] = {name: [] for name in weights}
    for name, stretches in owned.items():
        rest, given = _take_from_end(stretches, length_of(stretches) - weights.get(name, 0.0))
        loose += given
        if name in kept:
            kept[name] = rest
    loose = _joined(loose)
    for name, weight in weights.items():
        taken, loose = _take_from_start(loose, weight - length_of(kept[name]))
        kept[name] += taken
    if loose:  # what rounding left over, thinner than any weight
        kept[max(weights, key=lambda name: weights[name])] += loose
    return {name: tuple(_joined(stretches)) for name, stretches in kept.items()}


def allot_traffic(
    own: Sequence[Stretch], taken: Iterable[Stretch], percent: float, *, start: float
) -> tuple[Stretch, ...] | None:
    """Stretches of `percent` in all: what one has already, as far as it is needed, and more that nobody has.

    Args:
        own: What one has.
        taken: What others have.
        percent: How much it is to be.
        start: Where to look first, then upwards and again from 0. Another place each time keeps one experiment after
            the other from having the same units.

    Returns:
        The stretches in order, or None if others have too much.
    """
    missing = percent - length_of(own)
    if missing <= _TOLERANCE:
        return tuple(_take_from_start(own, percent)[0])
    free = _gaps(_joined([*taken, *own]))
    if length_of(free) < missing - _TOLERANCE:
        return None
    behind = [(max(low, start), high) for low, high in free if high > start]
    before = [(low, min(high, start)) for low, high in free if low < start]
    more, _ = _take_from_start([*behind, *before], missing)
    return tuple(_joined([*own, *more]))


def _gaps(stretches: Sequence[Stretch]) -> list[Stretch]:
    """What of [0, 100) lies between stretches that are in order."""
    ends = [0.0, *(high for _, high in stretches)]
    starts = [*(low for low, _ in stretches), 100.0]
    return [(low, high) for low, high in zip(ends, starts, strict=True) if low < high]


def _take_from_start(stretches: Sequence[Stretch], amount: float) -> tuple[list[Stretch], list[Stretch]]:
    """Split stretches into the first `amount` of them, up to rounding, and the rest."""
    taken: list[Stretch] = []
    rest: list[Stretch] = []
    for low, high in stretches:
        if amount <= _TOLERANCE:
            rest.append((low, high))
        elif high - low <= amount + _TOLERANCE:
            taken.append((low, high))
        else:
            taken.append((low, low + amount))
            rest.append((low + amount, high))
        amount -= high - low
    return taken, rest


def _take_from_end(stretches: Sequence[Stretch], amount: float) -> tuple[list[Stretch], list[Stretch]]:
    """Split stretches into those that stay and the last `amount` of them, up to rounding."""
    stay: list[Stretch] = []
    given: list[Stretch] = []
    for low, high in reversed(stretches):
        if amount <= _TOLERANCE:
            stay.append((low, high))
        elif high - low <= amount + _TOLERANCE:
            given.append((low, high))
        else:
            given.append((high - amount, high))
            stay.append((low, high - amount))
        amount -= high - low
    return stay[::-1], given[::-1]


def _joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Stretches in order, those that touch made one."""
    joined: list[Stretch] = []
    for low, high in sorted(stretches):
        if joined and joined[-1][1] >= low:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined
