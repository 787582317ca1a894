"""One training run from a file to a published version. Checks all that can be checked before it loads a model."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_files import pull_base
from adapters.base_model import LoadedBase, linear_shapes, load_base, load_tokenizer
from adapters.chat_template import RenderedRow, hash_chat_template
from adapters.database import open_database
from adapters.errors import RankTooHighError
from adapters.manifest import ADAPTER_CONFIG_FILE, DataReference, Manifest
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from training.config import TrainSettings
from training.formats import ChatDataset, read_chat_dataset
from training.losses import mean_loss
from training.rendering import render_dataset
from training.trainers import StepListener, add_adapter, train_sft

__all__ = ["SilentListener", "TrainingListener", "TrainingResult", "run_training"]

_RECORDED_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


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
    listener = listener or SilentListener()
    check_alias_name(alias)
    if settings.rank > core.max_rank:
        raise RankTooHighError(rank=settings.rank, max_rank=core.max_rank)
    listener.on_stage("Checking the data")
    train_data = read_chat_dataset(train_path)
    validation_data = read_chat_dataset(validation_path) if validation_path else None
    listener.on_stage(f"Tokenising for the base model {core.base}")
    tokenizer = load_tokenizer(pull_base(core.base, core.home))
    data = _render(tokenizer, train_data, validation_data, settings)

    listener.on_stage(f"Loading the base model {core.base} ({core.quantisation})")
    base = load_base(core)
    model = add_adapter(base, settings)
    before = _validate(base, data, settings, listener, "before")
    listener.on_stage(f"Training on {len(data.train)} rows")
    started = time.monotonic()
    counts = train_sft(model, base, data.train, settings, listener)
    train_seconds = time.monotonic() - started
    after = _validate(base, data, settings, listener, "after")

    metrics = {"validation_loss_before": before, "validation_loss_after": after, "num_steps": counts.num_steps}
    with tempfile.TemporaryDirectory(prefix="hotswap-adapter-") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        manifest = _describe(Path(folder), base, data, settings, metrics)
        listener.on_stage("Publishing")
        with closing(open_database(core.resolved_database_url)) as database:
            registry = Registry(database, ArtifactStore(core.home / "store"))
            published, is_live = registry.publish(Path(folder), manifest, alias=alias, promote=promote)
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


def _render(
    tokenizer: object, train: ChatDataset, validation: ChatDataset | None, settings: TrainSettings
) -> _RenderedData:
    train_rows = render_dataset(tokenizer, train, max_length=settings.max_length)
    validation_rows = render_dataset(tokenizer, validation, max_length=settings.max_length) if validation else []
    reference = DataReference(
        train_sha256=train.sha256,
        num_train_rows=len(train_rows),
        validation_sha256=validation.sha256 if validation else None,
        num_validation_rows=len(validation_rows),
    )
    return _RenderedData(train_rows, validation_rows, reference)


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
