"""A trainer of a job that is killed with SIGKILL at a point of its work: `python -m tests.support.dying_trainer POINT`.

POINT is `checkpoint` (the first one is recorded) or `publish` (the version's files are stored, nothing is registered).
The supervisor appends the job and the claim. A job that has died before is trained to its end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from adapters.jobs import JobService
from adapters.settings import resolve_home
from training.job import main

_POINTS = {"checkpoint": "add_checkpoint", "publish": "succeed"}


def _die_after(function: Any) -> Any:
    def dying(*arguments: Any, **options: Any) -> None:
        function(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    return dying


if __name__ == "__main__":
    marker = Path(resolve_home() / "has-died")
    if not marker.exists():
        marker.touch()
        name = _POINTS[sys.argv[1]]
        setattr(JobService, name, _die_after(getattr(JobService, name)))
    main(sys.argv[2:])
