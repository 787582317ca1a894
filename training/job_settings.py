"""From what a client asked of a job to the settings of its run, and from what went wrong to what a client is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.disk import is_about_the_disk
from adapters.errors import (
    ConfigurationError,
    DataError,
    FingerprintMismatchError,
    HotswapError,
    InvalidInputError,
    NotFoundError,
    RankTooHighError,
    TrainingDivergedError,
)
from adapters.files import FileService
from adapters.methods import WIRE_METHODS
from adapters.records import Job, JobError
from training.config import TrainSettings
from training.formats import ReadOptions
from training.memory import MEMORY_ADVICE, is_about_memory
from training.readers import is_told_by_line

__all__ = [
    "describe_failure",
    "hyperparameters_of",
    "name_data",
    "read_options",
    "resolve_settings",
    "tracker_environment",
]

_HYPERPARAMETERS = {"n_epochs": "epochs"}  # the wire's name -> the setting's; all others are called the same
_NO_SETTINGS = frozenset({"learning_rate_multiplier", "checkpoint_steps"})
# What these say is what to do about them.
_TELLING = (ConfigurationError, FingerprintMismatchError, NotFoundError)
_PATH = re.compile(r"(?<![\w.])~?(/[\w.@+~-]+)+/?")  # `and/or` is none: it begins with a name


def resolve_settings(job: Job, home: Path) -> TrainSettings:
    """What the client asked for, over the server's own settings; "auto" is the server's own.

    Raises:
        InvalidInputError: what was asked for does not fit together; each value for itself was checked before.
        ConfigurationError: the server's own settings are wrong.
    """
    given = {name: value for name, value in hyperparameters_of(job).items() if value != "auto"}
    multiplier = given.get("learning_rate_multiplier")
    flags = {_HYPERPARAMETERS.get(name, name): value for name, value in given.items() if name not in _NO_SETTINGS}
    if isinstance(schema := flags.get("gate_format_schema"), Mapping):  # the setting is its text
        flags["gate_format_schema"] = json.dumps(schema)
    kind = job.method["type"]
    flags |= {"method": WIRE_METHODS[kind], "start_from": job.start_from, "seed": job.seed}
    if job.integrations:
        flags["report_to"] = [integration["type"] for integration in job.integrations]
    TrainSettings.load(home)  # what is wrong with the server's own settings is not the job's fault
    try:
        settings = TrainSettings.load(home, **flags)
        if multiplier is not None:
            flags["learning_rate"] = min(1.0, settings.learning_rate * multiplier)
            settings = TrainSettings.load(home, **flags)
        is_validated = job.validation_file is not None or settings.validation_share is not None
        if "patience" in flags:
            settings.check_validation(is_given=job.validation_file is not None)
        elif not is_validated:  # the server's own patience is for jobs that are
            settings = settings.model_copy(update={"patience": None})
        return settings
    except ConfigurationError as error:
        raise InvalidInputError(str(error), param="method") from None


def hyperparameters_of(job: Job) -> Mapping[str, Any]:
    """Those that the client gave, by the wire's names."""
    found: Mapping[str, Any] = job.method[job.method["type"]]["hyperparameters"]
    return {name: value for name, value in found.items() if value is not None}


def name_data(job: Job, files: FileService) -> dict[str, str]:
    """What messages call a job's data: the names that its owner gave the files, by the field that named each.

    Raises:
        NotFoundError: a file is gone.
    """
    given = {"training_file": job.training_file, "validation_file": job.validation_file}
    names = {param: files.get(file_id).filename for param, file_id in given.items() if file_id is not None}
    is_clear = len(set(names.values())) == len(names)
    return names if is_clear else {param: f"{name} ({param})" for param, name in names.items()}


def read_options(files: FileService, file_id: str) -> ReadOptions:
    """How a job's file is read: JSON lines, which are called rows where the name is of a file without lines.

    Raises:
        NotFoundError: the file is gone.
    """
    return ReadOptions(has_lines=is_told_by_line(files.get(file_id).filename))


def tracker_environment(job: Job) -> dict[str, str]:
    """The variables by which the trackers that the client named learn where to show the run."""
    variables: dict[str, str] = {}
    for integration in job.integrations:
        shown: Mapping[str, Any] = integration[integration["type"]]
        for name, value in shown.items():
            text = ",".join(value) if isinstance(value, list) else value
            variables[f"{integration['type']}_{name}".upper()] = text
    return variables


def describe_failure(error: Exception) -> JobError:
    """What a client is told; whatever might hold a path is left to the log, or is told without the path."""
    if isinstance(error, DataError):
        return JobError(f"invalid_{error.param}", str(error), error.param)
    if isinstance(error, RankTooHighError) or (type(error) is InvalidInputError and error.param == "method"):
        return JobError("invalid_hyperparameters", str(error), "method")
    if isinstance(error, TrainingDivergedError):
        return JobError("training_diverged", str(error), "method")
    if any(is_about_memory(cause) for cause in _causes(error)):
        return JobError("out_of_memory", f"the device has too little memory for this job: {MEMORY_ADVICE}", "method")
    if any(is_about_the_disk(cause) for cause in _causes(error)):
        message = "the server's disk is full: free some space and create the job again"
        return JobError("disk_full", message)
    if isinstance(error, _TELLING):
        return JobError("training_failed", _PATH.sub("[a path of the server]", str(error)))
    kind = "training_failed" if isinstance(error, HotswapError) else "trainer_crashed"
    return JobError(kind, f"the trainer failed with {type(error).__name__}; the job's log on the server says why")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and what was being handled when it was raised."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
