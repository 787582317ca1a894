"""One training run from a file to a published version. Checks all that can be checked before it loads a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from adapters.base_files import public_name
from adapters.base_model import load_base
from adapters.database import open_database
from adapters.errors import OutOfMemoryError, RankTooHighError
from adapters.gate_report import GateReport
from adapters.manifest import Manifest
from adapters.pulse import EnginePulse, pulse_path
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from training.config import TrainSettings
from training.forgetting import Forgetting
from training.formats import ReadOptions
from training.giving_way import Gate, install_gate, share_from_environment
from training.liger import check_liger
from training.losses import Evaluation
from training.memory import MEMORY_ADVICE, is_about_memory, limit_kernel_cache
from training.methods import METHODS, VALIDATORS, TrainingRun
from training.plots import write_curves
from training.preparation import PreparedRun, load_function, prepare_run
from training.progress import Checkpointing, NextMove, StepListener, StepMetrics, TrainedCounts
from training.publication import (
    AdapterSaver,
    MoveRule,
    Published,
    Publisher,
    TrainedAdapter,
    VersionOpener,
    describe_version,
    judge_and_publish,
)
from training.run_data import DataFile, RenderedData, prepare_data
from training.run_log import RunLog, name_run_folder
from training.sampling import sample_answers
from training.trackers import prepare_trackers
from training.watching import RunListener, Watch, WatchPlan

__all__ = ["JobFolder", "SilentListener", "TrainingListener", "TrainingResult", "run_training", "train_and_publish"]


class TrainingListener(StepListener, RunListener, Protocol):
    """Told how a run goes on, for a person who watches."""

    def on_stage(self, message: str) -> None:
        """A new stage begins."""

    def on_warning(self, message: str) -> None:
        """Something in the data or in the run that its owner should know; nothing stops for it."""


class SilentListener:
    """A listener that tells nobody."""

    def on_stage(self, message: str) -> None:
        """Ignored."""

    def on_warning(self, message: str) -> None:
        """Ignored."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Ignored."""

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """Ignored."""


class JobWatcher(Protocol):
    """Told how a job's run goes on, and asked whether it may."""

    def next_move(self) -> NextMove:
        """Asked after every step: go on, stop after a checkpoint, or stop at once."""

    def on_metrics(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None, save: AdapterSaver) -> None:
        """The state after this step lies on the disk, whole; `validation` is its result, if there is data for it.

        `save` writes the adapter as it is at this step.
        """


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a job's run keeps its checkpoints, which of them it goes on from, and who watches it."""

    path: Path
    watcher: JobWatcher
    every_steps: int | None = None
    resume_from: Path | None = None


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run made. Losses are nats a token that carries loss; without a validation file they are None.

    `remark` is what the validation losses say of the run in a sentence, if anything.
    """

    published: NumberedVersion
    is_live: bool
    num_rows: int
    num_steps: int
    train_seconds: float
    tokens_per_second: float
    validation_loss_before: float | None
    validation_loss_after: float | None
    validation_accuracy_after: float | None
    best_step: int | None
    remark: str | None
    gate: GateReport
    folder: Path


def run_training(
    alias: str,
    train_path: Path,
    validation_path: Path | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: TrainingListener | None = None,
    options: ReadOptions | None = None,
    validation_options: ReadOptions | None = None,
    folder: Path | None = None,
) -> TrainingResult:
    """Train an adapter on rows of any known shape and publish it as the next version of `alias`.

    Metrics, samples and curves go to `folder`, or to a new one below the home folder's `runs`.

    Raises:
        InvalidNameError: `alias` can't be an alias.
        RankTooHighError: no server with these settings could serve the result.
        DataError: bad rows, named by file, line and field; nothing has been loaded by then.
        BaseModelError: the base model can't be fetched or loaded.
        OutOfMemoryError: the machine or its device has too little memory.
        TrainingDivergedError: the loss is no number, or only rises.
    """
    check_alias_name(alias)

    @contextmanager
    def open_versions() -> Iterator[Registry]:
        with closing(open_database(core.resolved_database_url)) as database:
            yield Registry(database, ArtifactStore(core.home / "store"))

    def publish(
        folder: Path, manifest: Manifest, counts: TrainedCounts, may_move: MoveRule, prompts: Sequence[str]
    ) -> tuple[NumberedVersion, bool]:
        with open_versions() as registry:
            return registry.publish(folder, manifest, alias=alias, promote=may_move, prompts=prompts)

    train = DataFile(train_path, str(train_path), "data", options)
    validation = (
        DataFile(validation_path, str(validation_path), "validation", validation_options) if validation_path else None
    )
    try:
        result = train_and_publish(
            alias,
            train,
            validation,
            core=core,
            settings=settings,
            listener=listener or SilentListener(),
            publish=publish,
            open_versions=open_versions,
            folder=folder or name_run_folder(core.home),
        )
    except Exception as error:
        # Whatever library it was: memory runs out in all of them, each with words of its own.
        if is_about_memory(error):
            raise OutOfMemoryError(f"the device has too little memory for this run: {MEMORY_ADVICE}") from error
        raise
    assert result is not None, "nobody stops a run without a watcher"
    return result


def train_and_publish(
    alias: str,
    train_file: DataFile,
    validation_file: DataFile | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: TrainingListener,
    publish: Publisher,
    open_versions: VersionOpener,
    folder: Path,
    job: JobFolder | None = None,
) -> TrainingResult | None:
    """Train an adapter and hand it to `publish`; None if the job's watcher stopped the run before its end.

    Args:
        alias: What points to the version that the gate compares with.
        train_file: What is trained on.
        validation_file: What the best state is chosen by, and the gate compares on.
        core: Base model and home.
        settings: Of the run.
        listener: Told of stages, steps, evaluations and alarms.
        publish: Called last.
        open_versions: Opens the registry with the versions that the settings name, and the alias.
        folder: The run's own, for metrics, samples and curves; made when training begins.
        job: Where a job's checkpoints lie.

    Raises:
        RankTooHighError: no server with these settings could serve the result.
        DataError: bad rows; nothing has been loaded by then.
        BaseModelError: the base model can't be fetched or loaded.
        ConfigurationError: settings that don't fit the base model, or the versions that they name.
        NotFoundError: no such version.
        TrainingDivergedError: the loss is no number, or only rises.
    """
    limit_kernel_cache()
    _check_rank(settings, core)
    settings.check_validation(is_given=validation_file is not None)
    check_liger(settings, core)
    function = load_function(settings, is_job=job is not None)
    prepare_trackers(settings.report_to, folder)
    # A job's data was inspected before it was queued.
    inspect = job is None
    data = prepare_data(train_file, validation_file, core=core, settings=settings, listener=listener, inspect=inspect)
    listener.on_stage(f"Loading the base model {public_name(core.base)} ({core.quantisation})")
    base = load_base(core)
    prepared = prepare_run(base, data.train, settings, open_versions, function, listener)
    _check_rank(prepared.run.settings, core)
    if (share := share_from_environment()) is not None:
        install_gate(base.model, Gate(EnginePulse(pulse_path(core.home)), share, is_ending=_ending_of(job)))
    trained, train_seconds = _train(prepared, data, listener=listener, folder=folder, job=job)
    if not trained.counts.is_complete:
        return None
    if job is not None and trained.remark:  # a run without a job has it in its result
        listener.on_warning(trained.remark)
    done = judge_and_publish(trained, alias, open_versions=open_versions, publish=publish, listener=listener)
    return _make_result(trained, done, len(data.train), train_seconds)


def _check_rank(settings: TrainSettings, core: CoreSettings) -> None:
    if settings.rank > core.max_rank:
        raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)


def _train(
    prepared: PreparedRun, data: RenderedData, *, listener: TrainingListener, folder: Path, job: JobFolder | None
) -> tuple[TrainedAdapter, float]:
    """Train to the end, or to where the job's watcher stops it, and restore the best state; and how long that took."""
    run, settings = replace(prepared.run, folder=folder), prepared.run.settings
    measure = VALIDATORS[settings.method](run, data.validation) if data.validation else None
    before = _validate(measure, listener)
    listener.on_stage(f"Training on {len(data.train)} rows")
    started = time.monotonic()

    def save(to: Path, metrics: dict[str, float | None]) -> Manifest:
        prepared.save(to)
        return describe_version(to, run.base, data.reference, settings, metrics, parent=prepared.parent)

    log = RunLog(folder, resume_step=_step_of(job.resume_from) if job and job.resume_from else 0)
    watch = Watch(_trained_modules(run), _plan(run, data, measure), log=log, listener=listener)
    run = replace(run, watch=watch, checkpointing=_keep_checkpoints(job, save) if job else None)
    try:
        counts = METHODS[settings.method](run)
    finally:
        # Of a run that was stopped or failed, too. A disk that is full has failed it already, in words of its own.
        with suppress(OSError):
            write_curves(log, settings.method)
    seconds = time.monotonic() - started
    if counts.is_complete:
        watch.restore_best()
    adapter = TrainedAdapter(
        run, save, measure, before, watch.best, counts, data.judged, data.asked, log, watch.remark(before)
    )
    return adapter, seconds


def _make_result(trained: TrainedAdapter, done: Published, num_rows: int, train_seconds: float) -> TrainingResult:
    counts, before = trained.counts, trained.before
    after = trained.best.evaluation if trained.best else None
    return TrainingResult(
        published=done.version,
        is_live=done.is_live,
        num_rows=num_rows,
        num_steps=counts.num_steps,
        train_seconds=train_seconds,
        tokens_per_second=counts.num_tokens / train_seconds,
        validation_loss_before=before.loss if before else None,
        validation_loss_after=after.loss if after else None,
        validation_accuracy_after=after.accuracy if after else None,
        best_step=trained.best.step if trained.best else None,
        remark=trained.remark,
        gate=done.gate,
        folder=trained.log.folder,
    )


class _SavingWatcher:
    """Tells the job's watcher how to write the adapter of a checkpoint."""

    def __init__(self, inner: JobWatcher, save: AdapterSaver) -> None:
        self._inner = inner
        self._save = save

    def next_move(self) -> NextMove:
        return self._inner.next_move()

    def on_metrics(self, metrics: StepMetrics) -> None:
        self._inner.on_metrics(metrics)

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        self._inner.on_checkpoint(metrics, validation, self._save)


def _keep_checkpoints(job: JobFolder, save: AdapterSaver) -> Checkpointing:
    return Checkpointing(job.path, _SavingWatcher(job.watcher, save), job.every_steps, job.resume_from)


def _trained_modules(run: TrainingRun[Any]) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([run.model] if run.head is None else [run.model, run.head])


def _plan(run: TrainingRun[Any], data: RenderedData, validate: Callable[[], Evaluation] | None) -> WatchPlan:
    settings = run.settings
    sample = partial(
        sample_answers,
        run.base.model,
        run.base.tokenizer,
        data.sampled,
        max_tokens=settings.sample_tokens,
        batch_size=settings.batch_size,
    )
    speaks = run.head is None
    return WatchPlan(
        measure=validate,
        forgetting=Forgetting(run).rise if speaks else None,
        max_forgetting=settings.gate_forgetting,
        sample=sample if data.sampled and speaks else None,
        eval_steps=settings.eval_steps,
        patience=settings.patience,
        has_alarms=run.score is None,  # the loss of rloo and grpo need not fall
    )


def _validate(validate: Callable[[], Evaluation] | None, listener: TrainingListener) -> Evaluation | None:
    if validate is None:
        return None
    listener.on_stage("Validation loss before training")
    return validate()


def _ending_of(job: JobFolder | None) -> Callable[[], bool]:
    return lambda: job is not None and job.watcher.next_move() != "continue"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
