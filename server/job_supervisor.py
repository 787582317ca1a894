"""Keeps the job supervisor running beside the server: a process of its own, known here by its module's name only."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import structlog

from adapters.process_log import log_environment
from adapters.processes import child_environment
from adapters.settings import CoreSettings
from server.config import ServeSettings

__all__ = ["SupervisorProcess"]

_log = structlog.get_logger(__name__)

_COMMAND = (sys.executable, "-m", "training.supervisor")
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_LONG_LIFE_S = 60.0
_STOP_TIMEOUT_S = 30.0


class SupervisorProcess:
    """Starts the supervisor in a thread, again whenever it dies, and ends it.

    A supervisor that dies at once each time is started ever more rarely, up to once a minute. It is told to end when
    `stopping` is set, while the server still finishes its answers.
    """

    def __init__(
        self,
        core: CoreSettings,
        settings: ServeSettings,
        stopping: threading.Event,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        threads = {"OMP_NUM_THREADS": str(settings.job_threads), "TOKENIZERS_PARALLELISM": "false"}
        share = {"HOTSWAP_JOB_SHARE": str(settings.job_share)}  # read by `training/giving_way.py`
        self._environment = os.environ | core.environment | threads | share | log_environment(settings.log_level)
        self._command = list(command)
        self._stopping = stopping
        self._thread = threading.Thread(target=self._keep_running, name="job-supervisor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Wait for the supervisor's end; a running job writes a checkpoint first."""
        self._stopping.set()
        self._thread.join()

    def _keep_running(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._stopping.is_set():
            try:
                environment = self._environment | child_environment()
                process = subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL)
            except OSError as error:
                # No memory or no process to be had: jobs wait, and this thread must not end silently.
                _log.error("job_supervisor_not_started", error=str(error), retry_in_s=_LONGEST_WAIT_S)
                self._stopping.wait(_LONGEST_WAIT_S)
                continue
            lived_s = 0.0
            while process.poll() is None and not self._stopping.wait(0.5):
                lived_s += 0.5
            if self._stopping.is_set():
                _end(process)
                return
            wait_s = _FIRST_WAIT_S if lived_s > _LONG_LIFE_S else min(2 * wait_s, _LONGEST_WAIT_S)
            _log.error("job_supervisor_died", returncode=process.returncode, restart_in_s=wait_s)
            self._stopping.wait(wait_s)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
