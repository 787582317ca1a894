"""Trains jobs whose trainers are killed with SIGKILL at random: `python -m tests.support.killed_jobs KILLS SEED...`.

The first job is let alone and counts the steps of a trainer's work: what is written, synced and renamed, every
statement to the database, every optimiser step. Each further one has a seed, and is killed up to KILLS times. The home
comes by the environment. It forks, so that the training libraries are imported once; no thread is started before.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch
from sqlalchemy import event

from adapters.database import open_database
from adapters.files import FileService
from adapters.jobs import JobService
from adapters.registry import Registry
from adapters.settings import CoreSettings, resolve_home
from adapters.store import ArtifactStore
from training.job import JobRun
from training.job_process import JobProcess

_FILE_STEPS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


def main() -> None:
    """Train the job that is let alone, then one for each seed, in the order in which they wait."""
    num_kills, seeds = int(sys.argv[1]), [int(seed) for seed in sys.argv[2:]]
    num_steps = _count_steps()
    for num_done, seed in enumerate(seeds, start=1):
        chosen = random.Random(seed)
        fatal_steps: list[int | None] = [chosen.randint(1, num_steps) for _ in range(num_kills)]
        for fatal_step in [*fatal_steps, None]:
            status = _in_child(partial(_train, num_done, fatal_step))
            if status == 0:  # one that goes on from a checkpoint has fewer steps: it may have come to its end
                break
            assert os.WIFSIGNALED(status), f"the trainer ended with status {status}"
            sys.stdout.write(f"seed {seed}: killed at step {fatal_step} of {num_steps}\n")


def _count_steps() -> int:
    reader, writer = os.pipe()
    assert _in_child(lambda: os.write(writer, str(_train(0, None)).encode())) == 0
    return int(os.read(reader, 100))


def _in_child(act: Callable[[], object]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def _train(num_done: int, fatal_step: int | None) -> int:
    """Work on the job behind so many that are done, up to the fatal step; returns how many steps there were.

    There are none if that job is done, too: a job's last steps are behind its success, where its trainer may be killed.
    """
    torch.set_num_threads(1)
    core = CoreSettings.load(resolve_home())
    database = open_database(core.resolved_database_url)
    steps = count(1)
    reached = 0

    def reach() -> None:
        nonlocal reached
        reached = next(steps)
        if reached == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)

    jobs = JobService(database)
    if sum(job.status == "succeeded" for job in jobs.list(limit=10_000)[0]) > num_done:
        return 0
    claim = jobs.claim(lease_s=0)  # a lease that has run out is a lost trainer's
    assert claim is not None
    for name in ("begin", "commit", "before_cursor_execute"):
        event.listen(database.engine, name, lambda **options: reach(), named=True)
    for name in _FILE_STEPS:
        setattr(os, name, _stop_before(getattr(os, name), reach))
    torch.optim.AdamW.step = _stop_before(torch.optim.AdamW.step, reach)  # type: ignore[method-assign]
    files = FileService(database, core.home / "files", max_bytes=1_000_000)
    process = JobProcess(claim, core, database, jobs, files, threading.Event())
    JobRun(process, Registry(database, ArtifactStore(core.home / "store"))).run()
    assert jobs.release(claim).status == "succeeded"
    return reached


def _stop_before(function: Callable[..., Any], reach: Callable[[], None]) -> Callable[..., Any]:
    def stopped(*args: Any, **options: Any) -> Any:
        reach()
        return function(*args, **options)

    return stopped


if __name__ == "__main__":
    main()
