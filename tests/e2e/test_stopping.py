"""SIGTERM: what runs is answered, what comes is refused, the record is complete, and the exit status is 0."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters.database import open_database
from adapters.tables import ExposureRow
from clients.local_server import started_server
from tests.e2e.conftest import Home, make_home

# The tiny model has 512 positions: a second or more for so many answers beside one another.
_LONG = {"max_tokens": 480, "ignore_eos": True, "n": 8, "stream": True, "temperature": 0}
_MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def home(tmp_path: Path, tiny_folders: dict[str, Path]) -> Home:
    """A home of its own: these servers are stopped."""
    made = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none")
    made.import_random("legal", tmp_path / "legal", seed=1)
    return made


def test_running_stream_ends_well_when_the_server_is_told_to_stop(home: Home) -> None:
    """Meanwhile `/ready` and new requests get 503; then the exposure is there and the exit status is 0."""
    with started_server(home.environment, home.path / "server.log") as server, httpx.Client(timeout=60) as client:
        with _long_stream(client, server.url) as lines:
            next(lines)
            server.process.terminate()
            refused = _wait_for_refusal(server.url)
            events = _events(lines)
        assert 0 == server.process.wait(60)
    assert "engine_unavailable" == refused["error"]["code"]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ["length"] * 8 == [reason for reason in reasons if reason]
    assert ["length"] == [row.finish_reason for row in _exposures(home)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_stream_ends_well_when_all_processes_are_told_to_stop(number: signal.Signals, home: Home) -> None:
    """As a terminal and some process managers do: engine and queues go on until the answers have ended."""
    with started_server(home.environment, home.path / "server.log") as server, httpx.Client(timeout=60) as client:
        with _long_stream(client, server.url) as lines:
            next(lines)
            os.killpg(server.pid, number)
            events = _events(lines)
        assert 0 == server.process.wait(60)
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert ["length"] * 8 == [reason for reason in reasons if reason]
    assert "Traceback" not in (home.path / "server.log").read_text()


def test_running_stream_is_cut_when_ctrl_c_is_pressed_twice(home: Home) -> None:
    """Nobody waits for an hour, and nothing is printed but what is logged."""
    options = ("--drain-s", "3600")
    with started_server(home.environment, home.path / "server.log", *options) as server, httpx.Client() as client:
        with _long_stream(client, server.url) as lines:
            next(lines)
            os.killpg(server.pid, signal.SIGINT)
            _wait_for_refusal(server.url)
            os.killpg(server.pid, signal.SIGINT)
            *_, last = _events(lines)
        assert 0 == server.process.wait(60)
    assert "the server is shutting down" == last["error"]["message"]
    assert "Traceback" not in (home.path / "server.log").read_text()


def test_server_ends_with_its_children_when_ctrl_c_is_pressed_while_it_loads(home: Home) -> None:
    """No traceback, and nobody is left who would load a base model for nobody."""
    command = [sys.executable, "-m", "clients.cli", "serve", "--port", "18999"]
    log = home.path / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=home.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    while not _children_of(process.pid):
        time.sleep(0.05)
        assert process.poll() is None, log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert 0 == process.wait(60)
    assert "Traceback" not in log.read_text()
    _wait_for_the_end_of(process.pid)


def _wait_for_the_end_of(group: int) -> None:
    """Return once a process group is empty: multiprocessing's resource tracker ends a moment after its parent."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            time.sleep(0.05)


def _children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_running_stream_ends_in_an_error_when_the_drain_takes_too_long(home: Home) -> None:
    """It is told so by a well-formed event, its exposure holds the reason, and the exit status is 0."""
    options = ("--drain-s", "0.05")
    with started_server(home.environment, home.path / "server.log", *options) as server, httpx.Client() as client:
        with _long_stream(client, server.url) as lines:
            next(lines)
            server.process.terminate()
            *_, last = _events(lines)
        assert 0 == server.process.wait(60)
    assert "the server is shutting down" == last["error"]["message"]
    assert ["the server is shutting down"] == [row.error for row in _exposures(home)]


def test_server_ends_at_once_when_nothing_runs(home: Home) -> None:
    """An idle server has nothing to wait for, and says by its exit status that all is well."""
    with started_server(home.environment, home.path / "server.log", "--drain-s", "3600") as server:
        server.process.terminate()
        assert 0 == server.process.wait(60)


@contextmanager
def _long_stream(client: httpx.Client, url: str) -> Iterator[Iterator[str]]:
    """The lines of a response that takes a while."""
    body = {"model": "legal", "messages": _MESSAGES} | _LONG
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert 200 == response.status_code, response.read()
        yield response.iter_lines()


def _events(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def _wait_for_refusal(url: str) -> dict[str, Any]:
    """Ask until the server says that it is not ready; then it takes no chat either."""
    while httpx.get(f"{url}/ready").status_code == 200:
        pass
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "legal", "messages": _MESSAGES})
    assert 503 == answer.status_code
    assert "retry-after" in answer.headers
    document: dict[str, Any] = answer.json()
    return document


def test_exposures_are_there_when_the_server_is_killed_behind_its_answers(home: Home) -> None:
    """What was acknowledged is what was answered to its end: kill -9 of all processes at that moment loses none."""
    body = {"model": "legal", "messages": _MESSAGES, "max_tokens": 4, "ignore_eos": True, "stream": True}
    answered = set()
    with started_server(home.environment, home.path / "server.log") as server, httpx.Client(timeout=60) as client:
        for _ in range(8):
            with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                for line in response.iter_lines():
                    if '"finish_reason": "length"' in line:
                        answered.add(json.loads(line.removeprefix("data: "))["id"])
                        break
        os.killpg(server.pid, signal.SIGKILL)
        server.process.wait(60)
    assert 8 == len(answered)
    assert answered <= {row.response_id for row in _exposures(home)}


def _exposures(home: Home) -> list[ExposureRow]:
    with (
        closing(open_database(f"sqlite:///{home.path / 'hotswap.db'}")) as database,
        Session(database.engine) as session,
    ):
        return list(session.scalars(select(ExposureRow)))
