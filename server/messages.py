"""What passes between an API process and the engine worker: commands one way, one message a step the other."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from server.engine.core import EngineEvent, EngineTimings, GenerationRequest
from server.engine.driven import DrivenEngine
from server.engine.residency import Residence

__all__ = [
    "ENGINE_CHANNEL",
    "CancelCommand",
    "Command",
    "EngineMessage",
    "EngineStatus",
    "PinCommand",
    "SubmitCommand",
    "UnloadCommand",
]

# LitServe routes a worker's output by request id to a buffer of that request. All of ours travel under one id, so that
# a step costs one message however many requests it served.
ENGINE_CHANNEL = "hotswap-engine"


@dataclass(frozen=True, slots=True)
class SubmitCommand:
    """Answer this request. `epoch` names the worker that the sender knows; another one ignores the command."""

    epoch: str
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class CancelCommand:
    """Nobody waits for this request any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class PinCommand:
    """Keep exactly these versions in slots, the first ones first."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UnloadCommand:
    """Free this version's slot once its last request has ended, unless it is pinned."""

    digest: str


Command = SubmitCommand | CancelCommand | PinCommand | UnloadCommand


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Who the worker is and how busy. `resident` holds the versions in slots, whether in use or not.

    `num_waiting_tokens` is what the waiting requests may take, `num_cache_free` and `num_cache_total` the blocks of the
    KV cache, `num_slots` those for versions.
    """

    epoch: str
    pid: int
    num_running: int
    num_waiting: int
    resident: tuple[str, ...]
    num_waiting_tokens: int = 0
    num_slots: int = 0
    num_cache_free: int = 0
    num_cache_total: int = 0
    num_shadows: int = 0

    @classmethod
    def of(cls, engine: DrivenEngine, epoch: str) -> EngineStatus:
        """How busy this process's engine is."""
        num_free, num_total = engine.cache_room
        return cls(
            epoch=epoch,
            pid=os.getpid(),
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            resident=tuple(engine.residency.resident),
            num_waiting_tokens=engine.num_waiting_tokens,
            num_slots=engine.num_slots,
            num_cache_free=num_free,
            num_cache_total=num_total,
            num_shadows=engine.num_shadows,
        )


@dataclass(frozen=True, slots=True)
class EngineMessage:
    """The events of one step, or none for a sign of life; and what was measured since the last message.

    `residency` says where versions are; None if nothing is said about it this time.
    """

    status: EngineStatus
    events: tuple[EngineEvent, ...]
    timings: EngineTimings = field(default_factory=EngineTimings)
    residency: tuple[Residence, ...] | None = None
