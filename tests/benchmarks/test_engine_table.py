"""`hotswap bench` in process on a tiny model: it runs and prints its rows. No figure is judged."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.errors import ConfigurationError
from benchmarks.engine_table import select_rows
from benchmarks.processes import cpu_seconds, process_tree, resident_bytes
from clients.cli.main import app


@pytest.fixture(autouse=True)
def _own_signal_handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_bench_prints_the_rows_and_writes_the_samples_when_run_on_a_tiny_model(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """The rows of the groups that were asked for, and no other; the conditions name the base model."""
    environment = {
        "HOTSWAP_HOME": str(tmp_path / "home"),
        "HOTSWAP_BASE": str(tiny_folders["llama"]),
        "HOTSWAP_QUANTISATION": "none",
        "HOTSWAP_DEVICE": "cpu",
    }
    target = tmp_path / "bench.json"
    arguments = ["bench", "--quick", "--only", "floor,cold", "--only", "peft", "--json", str(target)]
    result = CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)
    assert 0 == result.exit_code, result.output
    document = json.loads(target.read_text())
    keys = ["peft-mixed", "peft-switching", "floor-mixed", "floor-base", "cold"]
    assert keys == [row["key"] for row in document["rows"]]
    assert 2 + len(keys) == sum(line.startswith("|") for line in result.stdout.splitlines())
    assert "- base model: llama" in result.stdout.splitlines()
    assert "recorded peers" not in document["conditions"]


def test_rows_are_refused_when_there_are_no_such_rows() -> None:
    """The message lists those that there are; none named means all."""
    assert 9 == len(select_rows([]))
    assert {"floor", "cold"} == select_rows(["floor,cold", "floor"])
    with pytest.raises(ConfigurationError, match=r"no row 'flor'; there are mixed, .*floor"):
        select_rows(["flor"])


def test_process_costs_are_read_when_there_is_proc() -> None:
    """This process is the root of its tree, has used time, and takes memory."""
    import os

    tree = process_tree(os.getpid())
    assert os.getpid() == tree[0]
    assert cpu_seconds(tree) > 0
    assert resident_bytes(os.getpid()) > 1_000_000
