"""What the worker's loop needs of an engine: the real one has it, and so has the toy of the benchmarks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from server.engine.core import EngineEvent, EngineTimings, GenerationRequest
from server.engine.residency import Residence

__all__ = ["DrivenEngine", "DrivenResidency"]


class DrivenResidency(Protocol):
    """Where versions are."""

    @property
    def resident(self) -> Collection[str]:
        """Digests of the versions in slots."""

    def report(self) -> tuple[Residence, ...]:
        """Where each version is that is anywhere."""


class DrivenEngine(Protocol):
    """An engine as it is stepped; `server.engine.scheduler.Engine` says what each of these does."""

    @property
    def residency(self) -> DrivenResidency:
        """Where versions are."""

    @property
    def num_running(self) -> int:
        """Requests in the batch."""

    @property
    def num_shadows(self) -> int:
        """Shadows in the batch."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt and max_tokens of these."""

    @property
    def num_slots(self) -> int:
        """Places for versions."""

    @property
    def cache_room(self) -> tuple[int, int]:
        """Free blocks of the KV cache, and all of them."""

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""

    def submit(self, request: GenerationRequest) -> list[EngineEvent]:
        """Queue a request."""

    def cancel(self, request_id: str) -> list[EngineEvent]:
        """End a request."""

    def set_pinned(self, digests: tuple[str, ...]) -> list[EngineEvent]:
        """Have these versions keep their slots."""

    def unload(self, digest: str) -> list[EngineEvent]:
        """Free a version's slot."""

    def step(self) -> list[EngineEvent]:
        """Compute one token for everybody."""

    def take_timings(self) -> EngineTimings:
        """What steps took since the last call."""
