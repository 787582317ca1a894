"""One training run from a file to a published version. Checks all that can be checked before it loads a model."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_files import public_name, pull_base
from adapters.base_model import LoadedBase, linear_shapes, load_base, load_tokenizer
from adapters.chat_template import RenderedRow, hash_chat_template
from adapters.database import open_database
from adapters.errors import DataError, RankTooHighError
from adapters.manifest import ADAPTER_CONFIG_FILE, DataReference, Manifest
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from training.config import TrainSettings
from training.formats import ChatDataset, read_chat_dataset
from training.lora import add_adapter
from training.losses import Evaluation, evaluate, mean_loss
from training.methods import METHODS, TrainingRun
from training.progress import Checkpointing, NextMove, StepListener, StepMetrics, TrainedCounts
from training.rendering import render_dataset

__all__ = [
    "DataFile",
    "JobFolder",
    "JobWatcher",
    "Publisher",
    "SilentListener",
    "TrainingListener",
    "TrainingResult",
    "run_training",
    "train_and_publish",
]

_RECORDED_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")

# Makes the checked adapter in a folder a version; returns it, and whether its alias points to it.
Publisher = Callable[[Path, Manifest, TrainedCounts], tuple[NumberedVersion, bool]]


class TrainingListener(StepListener, Protocol):
    """Told how a run goes on, for a person who watches."""

    def on_stage(self, message: str) -> None:
        """A new stage begins."""


class SilentListener:
    """A listener that tells nobody."""

    def on_stage(self, message: str) -> None:
        """Ignored."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Ignored."""


class JobWatcher(Protocol):
    """Told how a job's run goes on, and asked whether it may."""

    def next_move(self) -> NextMove:
        """Asked after every step: go on, stop after a checkpoint, or stop at once."""

    def on_metrics(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        """The state after this step lies on the disk, whole; `validation` is its result, if there is data for it."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a job's run keeps its checkpoints, which of them it goes on from, and who watches it."""

    path: Path
    watcher: JobWatcher
    every_steps: int | None = None
    resume_from: Path | None = None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of training data, what messages call it, and the field of a request that named it."""

    path: Path
    name: str
    param: str

    def read(self) -> ChatDataset:
        """Read and check it.

        Raises:
            DataError: as `read_chat_dataset`, with the field at fault.
        """
        with _blaming(self.param):
            return read_chat_dataset(self.path, name=self.name)


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


@dataclass(frozen=True, slots=True)
class _RenderedData:
    train: list[RenderedRow]
    validation: list[RenderedRow]
    reference: DataReference


def run_training(
    alias: str,
    train_path: Path,
    validation_path: Path | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    promote: bool = True,
    listener: TrainingListener | None = None,
) -> TrainingResult:
    """Train an adapter on a JSONL file and publish it as the next version of `alias`.

    Raises:
        InvalidNameError: `alias` can't be an alias.
        RankTooHighError: no server with these settings could serve the result.
        DataError: bad rows, named by file, line and field; nothing has been loaded by then.
        BaseModelError: the base model can't be fetched or loaded.
    """
    check_alias_name(alias)

    def publish(folder: Path, manifest: Manifest, counts: TrainedCounts) -> tuple[NumberedVersion, bool]:
        with closing(open_database(core.resolved_database_url)) as database:
            registry = Registry(database, ArtifactStore(core.home / "store"))
            return registry.publish(folder, manifest, alias=alias, promote=promote)

    train = DataFile(train_path, str(train_path), "data")
    validation = DataFile(validation_path, str(validation_path), "validation") if validation_path else None
    result = train_and_publish(
        train, validation, core=core, settings=settings, listener=listener or SilentListener(), publish=publish
    )
    assert result is not None, "nobody stops a run without a watcher"
    return result


def train_and_publish(
    train_file: DataFile,
    validation_file: DataFile | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: TrainingListener,
    publish: Publisher,
    job: JobFolder | None = None,
) -> TrainingResult | None:
    """Train an adapter and hand it to `publish`; None if the job's watcher stopped the run before its end.

    Raises:
        RankTooHighError: no server with these settings could serve the result.
        DataError: bad rows; nothing has been loaded by then.
        BaseModelError: the base model can't be fetched or loaded.
    """
    if settings.rank > core.max_rank:
        raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)
    data = _prepare_data(train_file, validation_file, core=core, settings=settings, listener=listener)
    listener.on_stage(f"Loading the base model {public_name(core.base)} ({core.quantisation})")
    base = load_base(core)
    model = add_adapter(base, settings)
    before = _validate(base, data, settings, listener, "before")
    listener.on_stage(f"Training on {len(data.train)} rows")
    started = time.monotonic()
    checkpointing = _keep_checkpoints(job, base, data, settings) if job else None
    counts = METHODS["sft"](TrainingRun(model, base, data.train, settings, listener, checkpointing))
    if not counts.is_complete:
        return None
    train_seconds = time.monotonic() - started
    after = _validate(base, data, settings, listener, "after")

    metrics = {"validation_loss_before": before, "validation_loss_after": after, "num_steps": counts.num_steps}
    with tempfile.TemporaryDirectory(prefix="hotswap-adapter-") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        manifest = _describe(Path(folder), base, data, settings, metrics)
        listener.on_stage("Publishing")
        published, is_live = publish(Path(folder), manifest, counts)
    return TrainingResult(
        published=published,
        is_live=is_live,
        num_rows=len(data.train),
        num_steps=counts.num_steps,
        train_seconds=train_seconds,
        tokens_per_second=counts.num_tokens / train_seconds,
        validation_loss_before=before,
        validation_loss_after=after,
    )


def _prepare_data(
    train_file: DataFile,
    validation_file: DataFile | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: TrainingListener,
) -> _RenderedData:
    """Read, check and tokenise all rows; only the tokenizer of the base model is loaded for it."""
    listener.on_stage("Checking the data")
    train = train_file.read()
    validation = validation_file.read() if validation_file else None
    listener.on_stage(f"Tokenising for the base model {public_name(core.base)}")
    tokenizer = load_tokenizer(pull_base(core.base, core.home))
    with _blaming(train_file.param):
        train_rows = render_dataset(tokenizer, train, max_length=settings.max_length)
    validation_rows: list[RenderedRow] = []
    if validation_file and validation:
        with _blaming(validation_file.param):
            validation_rows = render_dataset(tokenizer, validation, max_length=settings.max_length)
    reference = DataReference(
        train_sha256=train.sha256,
        num_train_rows=len(train_rows),
        validation_sha256=validation.sha256 if validation else None,
        num_validation_rows=len(validation_rows),
    )
    return _RenderedData(train_rows, validation_rows, reference)


@contextmanager
def _blaming(param: str) -> Iterator[None]:
    """Add to an error in the data which field of a request named that data."""
    try:
        yield
    except DataError as error:
        error.param = param
        raise


class _EvaluatingWatcher:
    """Validates every checkpoint before the job's watcher hears of it."""

    def __init__(self, inner: JobWatcher, validate: Callable[[], Evaluation | None]) -> None:
        self._inner = inner
        self._validate = validate

    def next_move(self) -> NextMove:
        return self._inner.next_move()

    def on_metrics(self, metrics: StepMetrics) -> None:
        self._inner.on_metrics(metrics)

    def on_checkpoint(self, metrics: StepMetrics) -> None:
        self._inner.on_checkpoint(metrics, self._validate())


def _keep_checkpoints(job: JobFolder, base: LoadedBase, data: _RenderedData, settings: TrainSettings) -> Checkpointing:
    pad = base.tokenizer.pad_token_id

    def validate() -> Evaluation | None:
        if not data.validation:
            return None
        return evaluate(base.model, data.validation, batch_size=settings.batch_size, pad_token_id=pad)

    return Checkpointing(job.path, _EvaluatingWatcher(job.watcher, validate), job.every_steps, job.resume_from)


def _validate(
    base: LoadedBase, data: _RenderedData, settings: TrainSettings, listener: TrainingListener, when: str
) -> float | None:
    if not data.validation:
        return None
    listener.on_stage(f"Validation loss {when} training")
    pad = base.tokenizer.pad_token_id
    return mean_loss(base.model, data.validation, batch_size=settings.batch_size, pad_token_id=pad)


def _describe(
    folder: Path, base: LoadedBase, data: _RenderedData, settings: TrainSettings, metrics: dict[str, float | None]
) -> Manifest:
    """Check what was saved as strictly as the server will, and write down where it comes from."""
    _sort_target_modules(folder / ADAPTER_CONFIG_FILE)
    config = read_adapter_config(folder)
    shapes = {name.replace(".base_layer", ""): shape for name, shape in linear_shapes(base.model).items()}
    weights = read_adapter_weights(folder, config, shapes)
    return Manifest(
        source="trained",
        base=base.reference,
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=sorted({module.rsplit(".", 1)[-1] for module in weights.modules}),
        data=data.reference,
        settings=settings.model_dump(mode="json", exclude={"home"}),
        metrics=metrics,
        chat_template_sha256=hash_chat_template(base.tokenizer),
        libraries={name: version(name) for name in _RECORDED_LIBRARIES} | {"python": platform.python_version()},
    )


def _sort_target_modules(config_path: Path) -> None:
    # PEFT writes them in the order of a set: equal runs would get different names.
    document = json.loads(config_path.read_bytes())
    document["target_modules"] = sorted(document["target_modules"])
    config_path.write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")
