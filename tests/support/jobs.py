"""A home with a tiny base model, files and jobs, for the tests of trainers and supervisors."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.database import Database, open_database
from adapters.files import FileService
from adapters.jobs import Claim, JobOrder, JobService
from adapters.records import Job
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from tests.support.conversations import easy_rows, make_messages
from tests.support.tiny import tiny_settings
from training.job_process import JobProcess

__all__ = ["HYPERPARAMETERS", "JobPlace", "pass_all", "supervised"]

HYPERPARAMETERS = {
    "n_epochs": 2,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "rank": 4,
    "alpha": 8.0,
    "max_length": 64,
    "warmup_steps": 1,
}


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    """The method of a job: the small defaults above, and what is given."""
    return {"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS | hyperparameters}}


def pass_all(jobs: JobService) -> None:
    """Find the files of every new job valid, without looking."""
    while claim := jobs.claim_validation(lease_s=60):
        jobs.pass_validation(claim)
        jobs.release(claim)


@dataclass
class JobPlace:
    """A home folder, its database, and the services over it."""

    core: CoreSettings
    database: Database
    files: FileService
    jobs: JobService

    @classmethod
    def make(cls, root: Path, base: Path) -> JobPlace:
        """An empty home below `root`."""
        core = tiny_settings(base, home=root / "home")
        core.home.mkdir(parents=True)
        # A random base model forgets everything in six steps, and samples take longer than training: what the gate says
        # is tested elsewhere.
        settings = {"promote": '"always"', "gate_samples": 0, "sample_tokens": 4}
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (core.home / "hotswap.toml").write_text("[train]\n" + "".join(lines))
        database = open_database(core.resolved_database_url)
        files = FileService(database, core.home / "files", max_bytes=1_000_000)
        return cls(core, database, files, JobService(database))

    def upload(self, rows: Sequence[list[dict[str, str]]]) -> str:
        """Store conversations and return the file's id."""
        lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        return self.files.upload(io.BytesIO(lines.encode()), "rows.jsonl").id

    def create(self, *, alias: str = "legal", validate: bool = True, **hyperparameters: Any) -> Job:
        """Queue a job over ten easy rows, valid ones: six steps, three an epoch."""
        validation = self.upload([make_messages(f"V{n}", "Yes!") for n in range(3)]) if validate else None
        train = self.upload(easy_rows(10))
        order = JobOrder("tiny", train, supervised(**hyperparameters), 7, alias=alias, validation_file=validation)
        job = self.jobs.create(order)
        pass_all(self.jobs)
        return self.jobs.get(job.id)

    def claim(self) -> Claim:
        """Take the oldest job."""
        claim = self.jobs.claim(lease_s=60)
        assert claim is not None
        return claim

    def process(self, claim: Claim, stopping: threading.Event | None = None) -> JobProcess:
        """What a process that was started for a claim works with."""
        return JobProcess(claim, self.core, self.database, self.jobs, self.files, stopping or threading.Event())

    def registry(self) -> Registry:
        """Where jobs publish."""
        return Registry(self.database, ArtifactStore(self.core.home / "store"))

    def messages(self, job_id: str) -> list[str]:
        """What happened, oldest first."""
        return [event.message for event in self.jobs.follow(job_id, after=None, limit=1000)[0]]

    def wait(self, until: Callable[[], bool]) -> None:
        """Poll until something is so; the test's own time limit ends it otherwise."""
        while not until():
            time.sleep(0.02)
