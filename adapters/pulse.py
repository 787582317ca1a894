"""The engine's pulse: a small shared file that says when the engine last worked on an answer.

The engine writes it before each step and trainers on the same machine read it, so that they can give way. It costs
neither of them a system call.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["EnginePulse", "pulse_path"]

_FORMAT = struct.Struct("<d")
_IDLE = 0.0
# An engine that was killed looks busy for so long; no step of a running one takes longer but for very long prompts.
_FRESH_S = 1.0


def pulse_path(home: Path) -> Path:
    """Where the engine of a home folder has its pulse."""
    return home / "engine.pulse"


class EnginePulse:
    """One end of the pulse, made if it is not there. Both ends are on one machine, whose monotonic clock they share.

    Args:
        path: The file.
        clock: In seconds, the same for all processes.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() < _FORMAT.size:
                file.truncate(_FORMAT.size)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _FORMAT.size)
        self._clock = clock

    def beat(self) -> None:
        """The engine is at work."""
        _FORMAT.pack_into(self._memory, 0, self._clock())

    def rest(self) -> None:
        """The engine has nothing to do."""
        _FORMAT.pack_into(self._memory, 0, _IDLE)

    @property
    def is_beating(self) -> bool:
        """Whether the engine was at work within the last second."""
        (last,) = _FORMAT.unpack_from(self._memory)
        # After a restart of the machine the clock begins anew: a beat from the future is one of long ago.
        return last != _IDLE and 0 <= self._clock() - float(last) < _FRESH_S

    def close(self) -> None:
        """Let go of the file."""
        self._memory.close()
