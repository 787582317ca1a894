"""`hotswap bench` with its real servers on a tiny model: the rows over HTTP, the toy server, the worker's memory."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import Home


def test_bench_measures_over_http_when_run_on_a_tiny_model(tiny_home: Home, tmp_path: Path) -> None:
    """Every row that needs a server is there."""
    target = tmp_path / "bench.json"
    rows = "mixed,peers,single,slots,shell,memory"
    result = tiny_home.try_run("bench", "--quick", "--only", rows, "--json", str(target))
    assert result.returncode == 0, result.stderr
    found = [row["key"] for row in json.loads(target.read_text())["rows"]]
    peers = [f"{peer}-{clients}" for peer in ("vllm", "llama.cpp") for clients in (8, 32)]
    expected = ["mixed-1", "mixed-8", "mixed-32", *peers, "vllm-1", "llama.cpp-1", "slots"]
    assert [*expected, "shell", "shell-paced", "shell-wall", "memory", "memory-worker"] == found
