"""Validates the files of one job: `python -m training.validation <job id> <claim>`, started by the supervisor.

It runs beside whatever is being trained, so that bad data is known at once and not when the job's turn comes. Only the
base model's tokenizer is loaded.
"""

from __future__ import annotations

import sys

import structlog

from adapters.base_files import pull_base
from adapters.base_model import load_tokenizer
from adapters.errors import DataError, RankTooHighError
from training.formats import Dataset, read_rows
from training.held_out import choose_validation
from training.job_process import JobProcess, StoppedError, job_process
from training.job_settings import describe_failure, name_data, read_options, resolve_settings
from training.preflight import run_preflight

__all__ = ["ValidationRun", "main"]

_log = structlog.get_logger(__name__)


class ValidationRun:
    """One attempt at the validation of a job's files."""

    def __init__(self, process: JobProcess) -> None:
        self._process = process
        self._claim = process.claim

    def run(self) -> None:
        """Queue the job or fail it; a run that was stopped leaves it as it is."""
        job = self._claim.job
        try:
            self._validate()
            self._process.jobs.pass_validation(self._claim)
        except StoppedError:
            _log.info("validation_stopped", job=job.id)
        except Exception as error:
            # The process boundary: whatever it was, the job says so, and the traceback is in the job's log.
            _log.exception("validation_failed", job=job.id)
            self._process.jobs.fail(self._claim, describe_failure(error))

    def _validate(self) -> None:
        job, core = self._claim.job, self._process.core
        settings = resolve_settings(job, core.home)
        if settings.rank > core.max_rank:
            raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)
        train = self._read(job.training_file, "training_file")
        given = self._read(job.validation_file, "validation_file") if job.validation_file else None
        division = choose_validation(train, given, settings.validation_share, train_param="training_file")
        tokenizer = load_tokenizer(pull_base(core.base, core.home))
        report = run_preflight(
            division.train,
            division.validation,
            tokenizer=tokenizer,
            settings=settings,
            train_param="training_file",
            validation_param="validation_file" if given else "training_file",
        )
        for warning in (division.warning, *report.warnings):
            if warning:
                self._process.jobs.note(self._claim, warning, level="warn")

    def _read(self, file_id: str, param: str) -> Dataset:
        self._check_standing()
        try:
            files = self._process.files
            name, options = name_data(self._claim.job, files)[param], read_options(files, file_id)
            return read_rows(files.path(file_id), options, name=name).as_dataset()
        except DataError as error:
            error.param = param
            raise

    def _check_standing(self) -> None:
        if self._process.stopping.is_set() or self._process.jobs.standing(self._claim) != "continue":
            raise StoppedError


def main(arguments: list[str]) -> None:
    """Validate the files of one job in this process."""
    with job_process(arguments) as process:
        ValidationRun(process).run()


if __name__ == "__main__":
    main(sys.argv[1:])
