"""Slots without a model and a shelf of versions, both small enough to check every step of the book-keeping."""

from __future__ import annotations

import threading

import torch

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterWeightsError, RankTooHighError
from server.engine.residency import Residency

__all__ = ["VERSION_BYTES", "Shelf", "ToySlots", "settle"]

VERSION_BYTES = 20  # of every version on a shelf
_MAX_RANK = 4


class ToySlots:
    """Slots that hold the weights' objects themselves."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.contents: dict[int, AdapterWeights | None] = dict.fromkeys(range(1, num_slots + 1))
        self.num_copies = 0
        self.is_broken = False  # a copy breaks in the middle then

    def load(self, weights: AdapterWeights, *, slot: int) -> None:
        """Put weights into a slot, unless their rank is too high."""
        assert slot in self.contents
        if weights.rank > _MAX_RANK:
            raise RankTooHighError(rank=weights.rank, max_rank=_MAX_RANK)
        self.contents[slot] = weights
        if self.is_broken:
            raise RuntimeError("out of memory")
        self.num_copies += 1

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        assert slot in self.contents
        self.contents[slot] = None


class Shelf:
    """Versions by name. Reading one counts, takes until the gate is open, and fails for the names in `failing`."""

    def __init__(self, *names: str, too_high: str = "") -> None:
        tensors = {"layer": (torch.ones(1, 2), torch.ones(3, 1))}
        self.versions = {name: AdapterWeights(99 if name in too_high else 1, dict(tensors)) for name in names}
        self.failing: set[str] = set()
        self.reads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, digest: str) -> AdapterWeights:
        """The reader for a residency; called in its loader thread."""
        self.gate.wait()
        self.reads.append(digest)
        if digest in self.failing:
            raise AdapterWeightsError(f"{digest} is broken")
        return self.versions[digest]


def settle(residency: Residency) -> dict[str, str]:
    """Step until nothing is on its way; returns all failures."""
    failures = residency.finish_loads()
    while residency.is_loading:
        residency._loader.submit(bool).result()
        failures |= residency.finish_loads()
    return failures
