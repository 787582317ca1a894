"""`hotswap experiments replay --serve` as a user runs it: a server of its own, killed in between, and gone on with."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import ConfigurationError
from server.home_lock import held_home
from tests.e2e.conftest import Home
from tests.support.http import wait_until


def _is_free(home: Path) -> bool:
    """Whether no server holds the home."""
    try:
        with held_home(home, address="nowhere"):
            return True
    except ConfigurationError:
        return False


@pytest.mark.timeout(300)
def test_replay_goes_on_when_it_was_killed_with_its_server(tiny_home: Home, tmp_path: Path) -> None:
    """No server is left to hold the home, what was answered is not asked again, and the report counts all."""
    tiny_home.import_random("legal", tmp_path / "second", seed=7)
    prompts, output, journal = (tmp_path / name for name in ("p.jsonl", "report.json", "report.answers.jsonl"))
    rows = [{"prompt": f"question {number}", "completion": "a"} for number in range(60)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["experiments", "replay", "legal", "--a", "v1", "--b", "v2", "--prompts", str(prompts), "--serve"]
    command += ["--output", str(output), "--max-tokens", "40", "--concurrency", "1"]

    process = subprocess.Popen([sys.executable, "-m", "clients.cli", *command], env=tiny_home.environment)
    wait_until(lambda: process.poll() is not None or (journal.exists() and len(journal.read_text()) > 400))
    process.send_signal(signal.SIGKILL)
    assert -signal.SIGKILL == process.wait()
    kept = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 0 < len(kept) < 120

    wait_until(lambda: _is_free(tiny_home.path))
    ended = tiny_home.try_run(*command)
    assert 0 == ended.returncode, ended.stderr
    assert kept == journal.read_text().splitlines(keepends=True)[: len(kept)]
    report = json.loads(output.read_text())
    assert [(60, 0), (60, 0)] == [(version["num_answers"], version["num_failed"]) for version in report["versions"]]
    assert "won-tied-lost" in ended.stdout
