"""What passes between an API process and the engine worker: commands one way, one message a step the other."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.core import EngineEvent, GenerationRequest

__all__ = ["ENGINE_CHANNEL", "CancelCommand", "EngineMessage", "EngineStatus", "SubmitCommand"]

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
class EngineStatus:
    """Who the worker is and how busy. `resident` counts versions in slots, whether in use or not."""

    epoch: str
    pid: int
    num_running: int
    num_waiting: int
    resident: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineMessage:
    """The events of one step, or none for a sign of life."""

    status: EngineStatus
    events: tuple[EngineEvent, ...]
