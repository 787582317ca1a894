"""What processes cost, read from /proc; where that is missing (anything but Linux) the rows that need it are too."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cpu_seconds", "has_proc", "open_files", "process_tree", "resident_bytes"]

_PROC = Path("/proc")
_PARENT, _USER_TICKS, _SYSTEM_TICKS = 1, 11, 12  # fields of /proc/PID/stat behind the name (man 5 proc, from field 3)


def has_proc() -> bool:
    """Whether this machine tells."""
    return (_PROC / "self" / "stat").exists()


def process_tree(root: int) -> list[int]:
    """A process and all that descend from it, by number."""
    parents = {pid: fields[_PARENT] for pid in _all_pids() if (fields := _stat(pid))}
    tree = [root]
    for pid in tree:  # grows while it is walked
        tree += [child for child, parent in parents.items() if int(parent) == pid]
    return tree


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that the processes have used so far, in user and kernel mode together."""
    ticks = sum(int(fields[place]) for pid in pids for fields in [_stat(pid)] for place in _ticks(fields))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM, shared pages included."""
    pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """Files, pipes and sockets that a process has open."""
    return len(list((_PROC / str(pid) / "fd").iterdir()))


def _ticks(fields: list[str]) -> tuple[int, ...]:
    return (_USER_TICKS, _SYSTEM_TICKS) if fields else ()


def _all_pids() -> list[int]:
    return [int(path.name) for path in _PROC.iterdir() if path.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of a process's status behind its name; none if it has ended."""
    try:
        content = (_PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return content.rpartition(")")[2].split()
