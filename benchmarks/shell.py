"""What HTTP, validation, registry and transport cost per streamed token: the server's processes around a toy engine.

python -m benchmarks.shell --port PORT      such a server, on the home and base model of the environment
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adapters.settings import CoreSettings, resolve_home
from benchmarks.adapters8 import BenchHome
from benchmarks.over_http import Choice, Endpoint, Load, find_options, run_closed_loop
from benchmarks.processes import cpu_seconds, process_tree
from benchmarks.toy_engine import STEP_MS_VARIABLE, build_toy_engine
from clients.local_server import LocalServer, started_server
from server.config import ServeSettings

__all__ = ["ShellCost", "ToyServer", "running_toy_server"]

_WARM_UP_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class ShellCost:
    """Processor time of all server processes, and the time that passed, per streamed token in milliseconds."""

    cpu_ms: float
    wall_ms: float


@dataclass(frozen=True, slots=True)
class ToyServer:
    """A running server around a toy engine."""

    server: LocalServer
    endpoint: Endpoint

    def measure(self, *, concurrency: int, num_requests: int, num_tokens: int) -> ShellCost:
        """Send a load and divide what it cost by its tokens. The load generator's own processor time is left out."""
        pids = process_tree(self.server.pid)
        before = cpu_seconds(pids)
        summary = run_closed_loop(
            self.endpoint, Load([self.endpoint.base], concurrency, num_requests, num_tokens=num_tokens)
        )
        cpu = cpu_seconds(pids) - before
        return ShellCost(cpu / summary.num_tokens * 1000, summary.seconds / summary.num_tokens * 1000)


@contextmanager
def running_toy_server(home: BenchHome, *, step_ms: float) -> Iterator[ToyServer]:
    """Serve with a toy engine whose steps take `step_ms` for the length of the block."""
    environment = home.environment | {STEP_MS_VARIABLE: str(step_ms)}
    command = (sys.executable, "-m", "benchmarks.shell")
    with started_server(environment, home.core.home / "toy-server.log", command=command) as server:
        plain = Endpoint("toy", server.url, Choice("base"), ())
        endpoint = Endpoint("toy", server.url, Choice("base"), (), find_options(plain))
        run_closed_loop(endpoint, Load([endpoint.base], _WARM_UP_REQUESTS, _WARM_UP_REQUESTS, num_tokens=8))
        yield ToyServer(server, endpoint)


def main() -> None:
    """Serve with a toy engine until told to stop."""
    from server.app import serve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    home = resolve_home()
    settings = ServeSettings.load(home, port=options.port, log_level="warning")
    serve(CoreSettings.load(home), settings, build_toy_engine)


if __name__ == "__main__":
    main()
