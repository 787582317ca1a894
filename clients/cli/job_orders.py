"""`hotswap jobs create`: a job from data of this machine, in the table of the home folder, where a server finds it.

Whatever `hotswap train` reads is made rows here, as an upload has to be; a file of rows is stored as it is.
"""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.data_sources import DataSources, read_source
from clients.cli.job_output import print_job
from clients.cli.options import (
    BaseOption,
    EncodingOption,
    HomeOption,
    JoinTurnsOption,
    JsonOption,
    MapOption,
    RolesOption,
    SplitOption,
    SubsetOption,
    ValidationSplitOption,
    load_core,
    read_options,
    reading_flags,
)
from clients.cli.output import console, print_json
from server.home_lock import is_home_served

if TYPE_CHECKING:
    from adapters.files import FileService
    from adapters.jobs import JobService
    from adapters.records import Job
    from adapters.settings import CoreSettings
    from server.fine_tuning_schemas import CreateJobRequest
    from training.formats import ReadOptions

__all__ = ["create_job"]

_DataOption = Annotated[
    Path, typer.Option("--data", help="A file (JSONL, JSON, CSV, TSV, Parquet), a folder, or a hub id, as of train.")
]
_ValidationOption = Annotated[Path | None, typer.Option("--validation", help="The same, to measure on.")]
_ModelOption = Annotated[str, typer.Option("--model", help="base, or a version to go on from: legal@v2.")]
_SuffixOption = Annotated[str | None, typer.Option("--suffix", help="Alias to publish under, for example legal.")]
_MethodOption = Annotated[
    str, typer.Option("--method", help="supervised, dpo, kto, reward, rloo or grpo; docs/fine-tuning.md has them all.")
]
_SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter; may be given several times.")
]
_SeedOption = Annotated[int | None, typer.Option("--seed", help="Of everything that is drawn.", show_default="random")]
_PriorityOption = Annotated[int, typer.Option("--priority", help="-100 to 100; the highest is trained first.")]


def create_job(
    data: _DataOption,
    validation: _ValidationOption = None,
    model: _ModelOption = "base",
    suffix: _SuffixOption = None,
    method: _MethodOption = "supervised",
    hyperparameters: _SetOption = None,
    seed: _SeedOption = None,
    priority: _PriorityOption = 0,
    mapping: MapOption = None,
    roles: RolesOption = None,
    join_turns: JoinTurnsOption = False,
    split: SplitOption = None,
    validation_split: ValidationSplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    home: HomeOption = None,
    base: BaseOption = None,
    json: JsonOption = False,
) -> None:
    """Queue a job over data of this machine; hotswap serve on the same home folder trains it."""
    from adapters.disk import full_disk_told
    from adapters.methods import WIRE_METHODS

    core = load_core(home, base=base)
    chosen = dict(_read_pair(pair) for pair in hyperparameters or ())
    order: dict[str, Any] = {
        "model": model,
        "method": {"type": method, method: {"hyperparameters": chosen}} if chosen else {"type": method},
        "suffix": suffix,
        "seed": seed,
        "priority": priority,
    }
    options = read_options(mapping, split, subset, encoding, roles, join_turns=join_turns)
    sources = DataSources(data, options, validation, replace(options, split=validation_split))
    trained_as = None if method == "supervised" else WIRE_METHODS.get(method)
    with full_disk_told(core.home, "the job"):
        job = _place(core, order, sources, sources.check_command(home, base, {"method": trained_as}))
    if json:
        print_json(job)
        return
    print_job(job)
    is_served = is_home_served(core.home)
    who = "the server on this home folder" if is_served else "no server runs on this home folder: hotswap serve"
    console.print(
        f"{who} checks its files and trains it. Try: hotswap jobs show {job.id}", markup=False, soft_wrap=True
    )


def _place(core: CoreSettings, order: dict[str, Any], sources: DataSources, command: str) -> Job:
    """Store the files and queue the job; if it is refused, the files are deleted again. `command` is to be advised."""
    from adapters.database import open_database
    from adapters.files import FileService
    from adapters.jobs import JobService
    from server.config import ServeSettings

    settings = ServeSettings.load(core.home)
    database = open_database(core.resolved_database_url)
    files = FileService(database, core.home / "files", max_bytes=settings.max_file_bytes)
    stored: list[str] = []
    try:
        for name, (source, options) in zip(("training_file", "validation_file"), sources.given, strict=False):
            stored.append(_upload(files, source, options, command))
            order[name] = stored[-1]
        jobs = JobService(database, max_queued=settings.max_queued_jobs)
        return _accept(core, jobs, _check_order(order))
    except Exception:
        for file_id in stored:
            files.delete(file_id)
        raise
    finally:
        database.close()


def _read_pair(pair: str) -> tuple[str, Any]:
    """`rank=8` as a name and a number; what is no JSON is text."""
    from adapters.errors import InvalidInputError

    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise InvalidInputError(f"--set: expected NAME=VALUE, for example rank=8, found {pair!r}", param="set")
    try:
        return name, loads(value)
    except ValueError:
        return name, value


def _upload(files: FileService, source: Path, options: ReadOptions, command: str) -> str:
    """Store a source and return the file's id: a file of rows as it is, any other as the rows that it is read as.

    It keeps its name, so that messages of the job are about the file that its owner has; a name that would not tell
    whether rows are found by their lines gets another ending.
    """
    from adapters.errors import InvalidInputError
    from training.formats import as_lines
    from training.readers import is_told_by_line

    if not reading_flags(options) and _is_rows_file(source):
        try:
            with source.open("rb") as content:
                return files.upload(content, source.name).id
        except OSError as error:
            raise InvalidInputError(f"{source}: can't be read: {error.strerror}", param="data") from None
    dataset = read_source(source, options, command)
    name, has_lines = source.resolve().name or "data", dataset.rows[0].place.unit == "line"
    if is_told_by_line(name) != has_lines:
        name += ".jsonl" if has_lines else ".json"
    return files.upload(BytesIO(as_lines(dataset.rows)), name).id


def _is_rows_file(path: Path) -> bool:
    """Whether a file can be uploaded as it is; what is wrong with another is told when it is read."""
    from adapters.errors import DataError
    from adapters.rows_file import check_rows_file

    try:
        check_rows_file(path)
    except (DataError, OSError):
        return False
    return True


def _check_order(order: dict[str, Any]) -> CreateJobRequest:
    from pydantic import ValidationError

    from adapters.errors import InvalidInputError
    from server.fine_tuning_schemas import CreateJobRequest

    try:
        return CreateJobRequest.model_validate(order)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(f"{where}: {first['msg']}, found {first['input']!r:.80}", param=where) from None


def _accept(core: CoreSettings, jobs: JobService, body: CreateJobRequest) -> Job:
    from adapters.base_files import public_name
    from server.fine_tuning import FineTuningService

    return FineTuningService(jobs, base_name=public_name(core.base), max_rank=core.max_rank).accept(body)
