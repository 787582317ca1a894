"""The supervisor's process beside the server: started, started again, ended."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest

import server.job_supervisor
from server.config import ServeSettings
from server.job_supervisor import SupervisorProcess
from tests.support.tiny import tiny_settings

_DIES_ONCE = """
import os, pathlib, signal, sys, time
starts = pathlib.Path(os.environ["HOTSWAP_HOME"]) / "starts"
with starts.open("a") as file:
    file.write(os.environ["OMP_NUM_THREADS"] + " " + os.environ["HOTSWAP_JOB_SHARE"] + "\\n")
if len(starts.read_text().splitlines()) == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: (starts.with_name("ended").touch(), sys.exit(0)))
starts.with_name("up").touch()
while True:
    time.sleep(0.1)
"""


def test_supervisor_is_started_again_and_ended_when_it_dies_and_the_server_stops(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once: a second comes up with the settings of the server, and gets SIGTERM at the end."""
    monkeypatch.setattr(server.job_supervisor, "_FIRST_WAIT_S", 0.01)
    home = tmp_path / "home"
    home.mkdir()
    core = tiny_settings(tiny_folders["llama"], home=home)
    settings = ServeSettings.load(home, job_threads=3, job_share=0.5)
    process = SupervisorProcess(core, settings, threading.Event(), (sys.executable, "-c", _DIES_ONCE))
    process.start()
    while not (home / "up").exists():
        time.sleep(0.02)
    process.stop()
    assert (home / "starts").read_text() == "3 0.5\n3 0.5\n"
    assert (home / "ended").exists()
