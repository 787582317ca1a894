"""One training run from a file to a published version. Checks all that can be checked before it loads a model."""

from __future__ import annotations

import json
import platform
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_files import public_name, pull_base
from adapters.base_model import LoadedBase, load_base, load_tokenizer
from adapters.chat_rows import Row
from adapters.chat_template import hash_chat_template
from adapters.database import open_database
from adapters.errors import DataError, RankTooHighError
from adapters.gate_report import GateReport, may_promote
from adapters.manifest import ADAPTER_CONFIG_FILE, DataReference, Manifest, hash_file
from adapters.pulse import EnginePulse, pulse_path
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.reward_head import read_reward_head
from adapters.routing.prompts import prompts_of
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from training.config import TrainSettings
from training.evaluation import Yardstick
from training.formats import Dataset, ReadOptions, read_rows
from training.gate import judge
from training.gate_evidence import PresentVersion, find_present, gather_evidence
from training.giving_way import Gate, install_gate, share_from_environment
from training.losses import Evaluation
from training.methods import METHODS, VALIDATORS, TrainingRun, check_trainable, render_rows
from training.plots import write_curves
from training.preflight import run_preflight
from training.preparation import load_function, prepare_run
from training.progress import Checkpointing, NextMove, StepListener, StepMetrics, TrainedCounts
from training.rewards_file import public_reward
from training.run_log import RunLog
from training.sampling import SamplePrompt, make_prompts, read_prompts, sample_answers
from training.start import linear_shapes_of
from training.trackers import prepare_trackers
from training.watching import Best, RunListener, Watch, WatchPlan

__all__ = [
    "AdapterSaver",
    "DataFile",
    "JobFolder",
    "MoveRule",
    "Publisher",
    "SilentListener",
    "TrainingListener",
    "TrainingResult",
    "VersionOpener",
    "run_training",
    "train_and_publish",
]

_NOT_RECORDED = {
    "home",
    "keep_prompts",
    "promote",
    "sample_file",
}  # where it runs and what becomes of the result, not what it is
_RECORDED_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")

# Writes an adapter into a folder and checks it as strictly as the server; returns its manifest with these metrics.
# Raises AdapterRejectedError: the server would refuse it, for one that has learned nothing so far.
AdapterSaver = Callable[[Path, dict[str, float | None]], Manifest]
# Opens the registry with the versions that settings may name.
VersionOpener = Callable[[], AbstractContextManager[Registry]]
# What may move an alias: asked with the number that it points to when the version is published.
MoveRule = Callable[[int | None], bool]
# Makes the checked adapter in a folder a version, with prompts for the router; returns it, and whether its alias points
# to it.
Publisher = Callable[[Path, Manifest, TrainedCounts, MoveRule, Sequence[str]], tuple[NumberedVersion, bool]]


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
class DataFile:
    """A source of training data, what messages call it, the field of a request that named it, and how to read it."""

    path: Path
    name: str
    param: str
    options: ReadOptions | None = None

    def read(self) -> Dataset:
        """Read and check it.

        Raises:
            DataError: as `read_rows`, or rows are bad, with the field at fault.
        """
        with _blaming(self.param):
            return read_rows(self.path, self.options, name=self.name).as_dataset()


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a run made. Losses are nats a token that carries loss; without a validation file they are None."""

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
    gate: GateReport
    folder: Path


@dataclass(frozen=True, slots=True)
class _RenderedData:
    train: Sequence[Any]
    validation: Sequence[Any]
    reference: DataReference
    sampled: list[SamplePrompt]  # answered at each validation
    judged: list[SamplePrompt]  # answered for the gate
    prompts: list[str]  # kept for the router


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
) -> TrainingResult:
    """Train an adapter on rows of any known shape and publish it as the next version of `alias`.

    Raises:
        InvalidNameError: `alias` can't be an alias.
        RankTooHighError: no server with these settings could serve the result.
        DataError: bad rows, named by file, line and field; nothing has been loaded by then.
        BaseModelError: the base model can't be fetched or loaded.
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
    result = train_and_publish(
        alias,
        train,
        validation,
        core=core,
        settings=settings,
        listener=listener or SilentListener(),
        publish=publish,
        open_versions=open_versions,
        folder=core.home / "runs" / _make_run_id(),
    )
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
    if settings.rank > core.max_rank:
        raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)
    settings.check_validation(is_given=validation_file is not None)
    # A job's data was inspected before it was queued.
    inspect = job is None
    function = load_function(settings, is_job=job is not None)
    prepare_trackers(settings.report_to, folder)
    data = _prepare_data(train_file, validation_file, core=core, settings=settings, listener=listener, inspect=inspect)
    listener.on_stage(f"Loading the base model {public_name(core.base)} ({core.quantisation})")
    base = load_base(core)
    prepared = prepare_run(base, data.train, settings, open_versions, function, listener)
    settings, run = prepared.run.settings, prepared.run
    if settings.rank > core.max_rank:
        raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)
    if (share := share_from_environment()) is not None:
        install_gate(base.model, Gate(EnginePulse(pulse_path(core.home)), share, is_ending=_ending_of(job)))
    validate = VALIDATORS[settings.method](run, data.validation) if data.validation else None
    before = _validate(validate, listener)
    listener.on_stage(f"Training on {len(data.train)} rows")
    started = time.monotonic()

    def save(folder: Path, metrics: dict[str, float | None]) -> Manifest:
        prepared.save(folder)
        return _describe(folder, base, data, settings, metrics, parent=prepared.parent)

    log = RunLog(folder, resume_step=_step_of(job.resume_from) if job and job.resume_from else 0)
    watch = Watch(_trained_modules(run), _plan(run, data, validate), log=log, listener=listener)
    run = replace(run, watch=watch, checkpointing=_keep_checkpoints(job, save) if job else None)
    counts = METHODS[settings.method](run)
    if not counts.is_complete:
        return None
    train_seconds = time.monotonic() - started
    watch.restore_best()

    with tempfile.TemporaryDirectory(prefix="hotswap-adapter-") as scratch:
        saved = Path(scratch)
        manifest = save(saved, _metrics_of(before, watch.best, counts))
        listener.on_stage("Checking the version against the gate")
        present = find_present(open_versions, alias, run)
        yardstick = Yardstick(run, validate, before) if validate and before else None
        known = _find_report(present, manifest, saved)
        report = known or _judge(run, yardstick, watch.best, present, data.judged)
        log.note("gate", counts.num_steps, {"verdict": report.verdict, "reason": report.reason})
        write_curves(log)
        listener.on_stage("Publishing")
        judged = manifest.model_copy(update={"gate": report})
        published, is_live = publish(saved, judged, counts, _move_rule(settings, report, present), data.prompts)
    best = watch.best
    return TrainingResult(
        published=published,
        is_live=is_live,
        num_rows=len(data.train),
        num_steps=counts.num_steps,
        train_seconds=train_seconds,
        tokens_per_second=counts.num_tokens / train_seconds,
        validation_loss_before=before.loss if before else None,
        validation_loss_after=best.evaluation.loss if best else None,
        validation_accuracy_after=best.evaluation.accuracy if best else None,
        best_step=best.step if best else None,
        gate=report,
        folder=folder,
    )


def _make_run_id() -> str:
    return f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _prepare_data(
    train_file: DataFile,
    validation_file: DataFile | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: TrainingListener,
    inspect: bool,
) -> _RenderedData:
    """Read, check and tokenise all rows; only the tokenizer of the base model is loaded for it."""
    listener.on_stage("Checking the data")
    train = train_file.read()
    validation = validation_file.read() if validation_file else None
    listener.on_stage(f"Tokenising for the base model {public_name(core.base)}")
    tokenizer = load_tokenizer(pull_base(core.base, core.home))
    if inspect:
        _inspect(train, validation, (train_file, validation_file), tokenizer, settings, listener)
    with _blaming(train_file.param):
        train_rows = render_rows(tokenizer, train, settings)
        check_trainable(train_rows, train.name, settings)
    validation_rows: Sequence[Any] = []
    if validation_file and validation:
        with _blaming(validation_file.param):
            validation_rows = render_rows(tokenizer, validation, settings)
    reference = DataReference(
        train_sha256=train.sha256,
        num_train_rows=len(train.rows),
        validation_sha256=validation.sha256 if validation else None,
        num_validation_rows=len(validation.rows) if validation else 0,
    )
    rows = [numbered.row for numbered in (validation or train).rows]
    return _RenderedData(
        train_rows,
        validation_rows,
        reference,
        sampled=_sampled_prompts(tokenizer, rows, settings),
        judged=make_prompts(tokenizer, rows, limit=settings.gate_samples),
        prompts=prompts_of(numbered.row for numbered in train.rows) if settings.keep_prompts else [],
    )


def _sampled_prompts(tokenizer: Any, rows: Sequence[Row], settings: TrainSettings) -> list[SamplePrompt]:
    if settings.sample_file is None:
        return make_prompts(tokenizer, rows, limit=settings.sample_prompts)
    return read_prompts(tokenizer, Path(settings.sample_file))


def _inspect(
    train: Dataset,
    validation: Dataset | None,
    files: tuple[DataFile, DataFile | None],
    tokenizer: Any,
    settings: TrainSettings,
    listener: TrainingListener,
) -> None:
    """Refuse data that can't be trained on, and tell the listener what its owner should know of it."""
    params = [file.param if file else None for file in files]
    preflight = run_preflight(
        train,
        validation,
        tokenizer=tokenizer,
        settings=settings,
        train_param=params[0],
        validation_param=params[1],
    )
    for warning in preflight.warnings:
        listener.on_warning(warning)


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Add to an error in the data which field of a request named that data."""
    try:
        yield
    except DataError as error:
        error.param = param
        raise


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


def _plan(run: TrainingRun[Any], data: _RenderedData, validate: Callable[[], Evaluation] | None) -> WatchPlan:
    settings = run.settings
    sample = partial(
        sample_answers,
        run.base.model,
        run.base.tokenizer,
        data.sampled,
        max_tokens=settings.sample_tokens,
        batch_size=settings.batch_size,
    )
    return WatchPlan(
        measure=validate,
        sample=sample if data.sampled and run.head is None else None,
        eval_steps=settings.eval_steps,
        patience=settings.patience,
        has_alarms=run.score is None,  # the loss of rloo and grpo need not fall
    )


def _validate(validate: Callable[[], Evaluation] | None, listener: TrainingListener) -> Evaluation | None:
    if validate is None:
        return None
    listener.on_stage("Validation loss before training")
    return validate()


def _judge(
    run: TrainingRun[Any],
    yardstick: Yardstick | None,
    best: Best | None,
    present: PresentVersion | None,
    prompts: Sequence[SamplePrompt],
) -> GateReport:
    candidate = best.evaluation if best else None
    evidence = gather_evidence(run, yardstick, candidate=candidate, present=present, prompts=prompts)
    return judge(evidence, run.settings)


def _find_report(present: PresentVersion | None, manifest: Manifest, folder: Path) -> GateReport | None:
    """The report of what the alias answers with already, if that is this version: published again, it stays the same.

    Equal in all that is recorded, not in its bytes alone: under other settings of the gate they are judged again.
    """
    known = present.manifest if present else None
    if known is None or any(hash_file(folder / name) != file.sha256 for name, file in known.files.items()):
        return None
    same = manifest.model_copy(update={"files": known.files, "gate": known.gate})
    return known.gate if same.digest == known.digest else None


def _move_rule(settings: TrainSettings, report: GateReport, present: PresentVersion | None) -> MoveRule:
    """With the gate, the alias moves only from where it pointed to when the gate compared."""
    compared = present.version.number if present else None

    def may_move(number: int | None) -> bool:
        return may_promote(settings.promote, report) and (settings.promote == "always" or number == compared)

    return may_move


def _metrics_of(before: Evaluation | None, best: Best | None, counts: TrainedCounts) -> dict[str, float | None]:
    after = best.evaluation if best else None
    metrics: dict[str, float | None] = {
        "validation_loss_before": before.loss if before else None,
        "validation_loss_after": after.loss if after else None,
        "validation_accuracy_after": after.accuracy if after else None,
    }
    for when, found in (("before", before), ("after", after)):
        metrics |= {f"validation_{name}_{when}": value for name, value in (found.extra if found else {}).items()}
    return metrics | {"num_steps": counts.num_steps, "best_step": best.step if best else None}


def _ending_of(job: JobFolder | None) -> Callable[[], bool]:
    return lambda: job is not None and job.watcher.next_move() != "continue"


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _describe(
    folder: Path,
    base: LoadedBase,
    data: _RenderedData,
    settings: TrainSettings,
    metrics: dict[str, float | None],
    *,
    parent: str | None,
) -> Manifest:
    """Check what was saved as strictly as the server will, and write down where it comes from."""
    _sort_target_modules(folder / ADAPTER_CONFIG_FILE)
    config = read_adapter_config(folder)
    weights = read_adapter_weights(folder, config, linear_shapes_of(base))
    is_reward_model = settings.method == "reward"
    if is_reward_model:
        read_reward_head(folder, base.model.config.get_text_config().hidden_size)
    return Manifest(
        source="trained",
        kind="reward" if is_reward_model else "chat",
        method=settings.method,
        parent=parent,
        base=base.reference,
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in weights.modules}),
        data=data.reference,
        settings=settings.model_dump(mode="json", exclude=_NOT_RECORDED) | {"reward": public_reward(settings.reward)},
        metrics=metrics,
        chat_template_sha256=hash_chat_template(base.tokenizer),
        libraries={name: version(name) for name in _RECORDED_LIBRARIES} | {"python": platform.python_version()},
    )


def _sort_target_modules(config_path: Path) -> None:
    # PEFT writes them in the order of a set: equal runs would get different names.
    document = json.loads(config_path.read_bytes())
    document["target_modules"] = sorted(document["target_modules"])
    config_path.write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")
