"""What eight adapters add to a running server's memory."""

from __future__ import annotations

from benchmarks.adapters8 import BenchHome, publish_adapters
from benchmarks.over_http import Choice, Endpoint, Load, run_closed_loop
from benchmarks.processes import process_tree, resident_bytes
from clients.local_server import started_server

__all__ = ["measure_worker_growth"]


def measure_worker_growth(home: BenchHome, num_adapters: int, *, num_tokens: int) -> tuple[int, int]:
    """Compare the engine worker of a server without adapters and one slot, the least there is, with one that has them.

    Two servers, since a server takes its slots' memory when it starts. Both are read after the same number of answers,
    so that buffers of the computation are in both; the one slot is too.

    Args:
        home: A home without adapters; they are published here between the two servers.
        num_adapters: How many to publish, and the second server's slots.
        num_tokens: Length of each answer.

    Returns:
        The difference and the size of the adapters' files, in bytes.
    """
    without = _worker_bytes(home, 1, ["base"] * num_adapters, num_tokens)
    published = publish_adapters(home.core, num_adapters)
    held = _worker_bytes(home, num_adapters, [adapter.alias for adapter in published], num_tokens)
    return held - without, sum(adapter.num_bytes for adapter in published)


def _worker_bytes(home: BenchHome, num_slots: int, models: list[str], num_tokens: int) -> int:
    """Serve, ask all models at once, and read the process that holds the base model: the largest of the server's."""
    flags = ("--log-level", "warning", "--slots", str(num_slots))
    with started_server(home.environment, home.core.home / "memory-server.log", *flags) as server:
        endpoint = Endpoint("hotswap", server.url, Choice("base"), (), {"temperature": 0})
        choices = [Choice(model) for model in models]
        run_closed_loop(endpoint, Load(choices, len(choices), len(choices), num_tokens))
        return max(resident_bytes(pid) for pid in process_tree(server.pid))
