"""Clients that leave and send garbage, on a real server; the measured run is `python -m benchmarks.abuse`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.abuse import Abuse, is_level, run_abuse
from benchmarks.processes import process_tree
from clients.local_server import started_server
from tests.e2e.conftest import make_home


def test_server_holds_nothing_when_clients_left_and_sent_garbage(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """No 5xx but 503, no stream cut off, and all is level afterwards."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none")
    home.import_random("legal", tmp_path / "legal", seed=1)
    abuse = Abuse(clients=24, seconds=4, tokens=64)
    with started_server(home.environment, home.path / "server.log") as server:
        report = asyncio.run(run_abuse(server.url, process_tree(server.pid), ["base", "legal"], abuse))
    tally = report.tally
    assert 0 == tally.num_server_errors
    assert {"done"} == set(tally.endings)
    assert {400, 404} == set(tally.garbage)
    assert tally.statuses[200] <= report.after.answered - report.before.answered <= tally.statuses[200] + tally.num_left
    assert is_level(report)
