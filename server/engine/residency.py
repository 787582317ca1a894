"""Which version is in which slot: loads off the hot path, evicts the least recently used that nobody runs on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto

import structlog

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterRejectedError
from server.engine.lora import AdapterSlots

__all__ = ["Residency", "Wait"]

_log = structlog.get_logger(__name__)

# What clients are told of any other error, whose message may name files.
_UNREADABLE = "its stored files are missing or damaged; the server's log has the reason"

# Reads and validates a version's weights; called in a loader thread, so it must not touch the model.
WeightsReader = Callable[[str], AdapterWeights]


class Wait(Enum):
    """Why a version can't run this step."""

    LOADING = auto()  # it will be there soon; others may go on
    NO_SLOT = auto()  # every slot is in use; wait for one to drain


@dataclass(slots=True)
class _Resident:
    slot: int
    users: int
    last_used: int


class Residency:
    """The slots' book-keeping. Only the engine's thread calls it; reading files happens in one loader thread."""

    def __init__(self, slots: AdapterSlots, read_weights: WeightsReader) -> None:
        self._slots = slots
        self._read_weights = read_weights
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._free = list(range(slots.num_slots, 0, -1))
        self._resident: dict[str, _Resident] = {}
        self._loading: dict[str, tuple[int, Future[AdapterWeights]]] = {}
        self._clock = 0

    def acquire(self, digest: str) -> int | Wait:
        """The version's slot, held for one request until `release`; or why it must wait. Starts loading if absent."""
        if resident := self._resident.get(digest):
            resident.users += 1
            self._clock += 1
            resident.last_used = self._clock
            return resident.slot
        if digest in self._loading:
            return Wait.LOADING
        slot = self._take_slot()
        if slot is None:
            return Wait.NO_SLOT
        self._loading[digest] = (slot, self._loader.submit(self._read_weights, digest))
        return Wait.LOADING

    def release(self, digest: str) -> None:
        """One request less runs on the version; it stays in its slot until the slot is needed."""
        self._resident[digest].users -= 1

    def finish_loads(self) -> dict[str, str]:
        """Put what the loader has read into the slots; returns a reason for each version that failed."""
        failures = {}
        for digest, (slot, future) in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[digest]
            try:
                self._slots.load(future.result(), slot=slot)
            except Exception as error:
                # A loading boundary: whatever is wrong with one version must not reach the others.
                _log.warning(
                    "adapter_load_failed",
                    digest=digest,
                    reason=str(error),
                    exc_info=not isinstance(error, AdapterRejectedError),
                )
                self._free.append(slot)
                failures[digest] = str(error) if isinstance(error, AdapterRejectedError) else _UNREADABLE
                continue
            self._clock += 1
            self._resident[digest] = _Resident(slot, users=0, last_used=self._clock)
        return failures

    @property
    def is_loading(self) -> bool:
        """Whether any version is on its way."""
        return bool(self._loading)

    @property
    def resident(self) -> dict[str, int]:
        """Versions in slots: digest -> number of requests that run on it."""
        return {digest: entry.users for digest, entry in self._resident.items()}

    def close(self) -> None:
        """Stop the loader thread."""
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        idle = [(entry.last_used, digest) for digest, entry in self._resident.items() if entry.users == 0]
        if not idle:
            return None
        _, oldest = min(idle)
        return self._resident.pop(oldest).slot
