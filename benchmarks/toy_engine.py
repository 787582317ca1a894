"""An engine that computes nothing: each step gives each request its next token. What is left is all around it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

from adapters.settings import CoreSettings
from server.config import ServeSettings
from server.engine.core import EngineEvent, EngineTimings, GenerationRequest
from server.engine.driven import DrivenEngine
from server.engine.residency import Residence

__all__ = ["STEP_MS_VARIABLE", "ToyEngine", "build_toy_engine"]

STEP_MS_VARIABLE = "BENCH_TOY_STEP_MS"
_TEXT = " toy"


def build_toy_engine(core: CoreSettings, serve: ServeSettings) -> DrivenEngine:
    """Called in the worker instead of `build_engine`; a step takes what the environment says, by default no time."""
    return ToyEngine(step_s=float(os.environ.get(STEP_MS_VARIABLE, "0")) / 1000)


@dataclass
class ToyResidency:
    """Nothing is ever in a slot."""

    resident: dict[str, int] = field(default_factory=dict)

    def report(self) -> tuple[Residence, ...]:
        """No version is anywhere."""
        return ()


class ToyEngine:
    """The engine's interface as the worker's loop uses it.

    Args:
        step_s: How long a step with requests takes; it sleeps, which costs no processor time.
    """

    def __init__(self, *, step_s: float = 0.0) -> None:
        self._step_s = step_s
        self._lengths: dict[str, int] = {}
        self._wanted: dict[str, int] = {}
        self.residency = ToyResidency()
        self.num_waiting = self.num_waiting_tokens = self.num_slots = self.num_shadows = 0
        self.cache_room = (0, 0)

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._wanted)

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not self._wanted

    def submit(self, request: GenerationRequest) -> list[EngineEvent]:
        """Start answering at the next step."""
        self._wanted[request.id] = request.sampling.max_tokens
        self._lengths[request.id] = 0
        return []

    def cancel(self, request_id: str) -> list[EngineEvent]:
        """Stop answering; unknown ids are ignored."""
        if request_id not in self._wanted:
            return []
        return [self._end(request_id, EngineEvent(request_id, finish_reason="cancelled"))]

    def set_pinned(self, digests: tuple[str, ...]) -> list[EngineEvent]:
        """There is nothing to pin."""
        return []

    def unload(self, digest: str) -> list[EngineEvent]:
        """There is nothing to free."""
        return []

    def step(self) -> list[EngineEvent]:
        """One token for everybody."""
        if self._wanted and self._step_s:
            time.sleep(self._step_s)
        return [self._advance(request_id) for request_id in list(self._wanted)]

    def take_timings(self) -> EngineTimings:
        """Nothing is measured."""
        return EngineTimings()

    def _advance(self, request_id: str) -> EngineEvent:
        length = self._lengths[request_id] = self._lengths[request_id] + 1
        if length < self._wanted[request_id]:
            return EngineEvent(request_id, _TEXT, length)
        return self._end(request_id, EngineEvent(request_id, _TEXT, length, "length"))

    def _end(self, request_id: str, event: EngineEvent) -> EngineEvent:
        del self._wanted[request_id], self._lengths[request_id]
        return event
