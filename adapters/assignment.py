"""Which arm a unit falls into: a pure function, so that every process and every replay gives the same answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from adapters.records import Arm

__all__ = ["assign_arm", "unit_position"]

_HASH_BYTES = 8


def unit_position(salt: str, unit: str) -> float:
    """Where a unit falls in [0, 100): uniform over units, independent between salts.

    The first eight bytes of SHA-256 over the salt's length, the salt and the unit, so that no two pairs run together.
    """
    text = f"{len(salt)}:{salt}:{unit}".encode()
    head = int.from_bytes(hashlib.sha256(text).digest()[:_HASH_BYTES], "big")
    # The top 53 bits are what a float holds exactly; more would round the last positions up to 100.
    return (head >> 11) * 100.0 / (1 << 53)


def assign_arm(arms: Sequence[Arm], salt: str, unit: str) -> Arm:
    """Return the arm whose stretch of [0, 100) holds the unit's position; weights must add up to 100."""
    position = unit_position(salt, unit)
    upper = 0.0
    for arm in arms:
        upper += arm.weight
        if position < upper:
            return arm
    return next(arm for arm in reversed(arms) if arm.weight > 0)  # rounding in the sum of the weights
