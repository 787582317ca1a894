"""How much is measured: the whole table, or just enough to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ROW_GROUPS", "Scale"]

ROW_GROUPS = ("mixed", "peers", "single", "peft", "floor", "cold", "slots", "shell", "memory")


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all measurements.

    Args:
        tokens: New tokens of each answer.
        repeats: How often each comparison is made.
        rounds: Requests of each client in a closed loop.
        steps: Decode steps, and passes through the linear layers, a repeat.
        cold_loads: Versions that are loaded cold.
    """

    tokens: int = 64
    repeats: int = 3
    rounds: int = 3
    steps: int = 40
    cold_loads: int = 20

    @classmethod
    def quick(cls) -> Scale:
        """A minute on the embedded base model; the figures are worth nothing."""
        return cls(tokens=3, repeats=1, rounds=1, steps=2, cold_loads=3)
