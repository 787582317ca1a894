"""Lists by pages: what all of them have in common. A page begins behind a row that the one before ended with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from adapters.errors import InvalidInputError

__all__ = ["cut_page", "unknown_place"]

_Item = TypeVar("_Item")
_MAX_SHOWN = 80


def cut_page(items: Sequence[_Item], limit: int) -> tuple[list[_Item], bool]:
    """The first `limit` of what was read, one more than that if there is more, and whether there is."""
    return list(items[:limit]), len(items) > limit


def unknown_place(given: str) -> InvalidInputError:
    """The error for a list that is to go on behind something that is not in it, or that the actor may not see."""
    return InvalidInputError(f"after: there is nothing called {given[:_MAX_SHOWN]!r} in this list", param="after")
