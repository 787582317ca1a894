"""The data of one run: read, checked and tokenised before the base model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.base_files import public_name, pull_base
from adapters.base_model import load_tokenizer
from adapters.chat_rows import Row
from adapters.errors import DataError
from adapters.manifest import DataReference
from adapters.routing.prompts import prompts_of
from adapters.settings import CoreSettings
from training.config import TrainSettings
from training.formats import Dataset, ReadOptions, read_rows
from training.held_out import choose_validation
from training.methods import check_trainable, render_rows
from training.preflight import run_preflight
from training.sampling import SamplePrompt, make_prompts, read_prompts

__all__ = ["DataFile", "DataListener", "RenderedData", "prepare_data"]


class DataListener(Protocol):
    """Told how the preparation goes on."""

    def on_stage(self, message: str) -> None:
        """A new stage begins."""

    def on_warning(self, message: str) -> None:
        """Something in the data that its owner should know; nothing stops for it."""


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
class RenderedData:
    """The rows of a run as its method takes them, where they come from, and the prompts that are answered."""

    train: Sequence[Any]
    validation: Sequence[Any]
    reference: DataReference
    sampled: list[SamplePrompt]  # answered at each validation
    judged: list[SamplePrompt]  # answered for the gate
    asked: list[str]  # kept for the router


def prepare_data(
    train_file: DataFile,
    validation_file: DataFile | None,
    *,
    core: CoreSettings,
    settings: TrainSettings,
    listener: DataListener,
    inspect: bool,
) -> RenderedData:
    """Read, check and tokenise all rows; only the tokenizer of the base model is loaded for it.

    Without a validation file, `validation_share` of the training rows is held out, if it is set.
    """
    listener.on_stage("Checking the data")
    train = train_file.read()
    validation = validation_file.read() if validation_file else None
    share = settings.validation_share if validation is None else None
    division = choose_validation(train, validation, share, train_param=train_file.param)
    train, validation = division.train, division.validation
    if share is not None:
        listener.on_stage(f"Held out {division.counts} for validation")
    if division.warning and inspect:
        listener.on_warning(division.warning)
    validation_param = validation_file.param if validation_file else train_file.param
    listener.on_stage(f"Tokenising for the base model {public_name(core.base)}")
    tokenizer = load_tokenizer(pull_base(core.base, core.home))
    if inspect:
        _inspect(train, validation, (train_file.param, validation_param), tokenizer, settings, listener)
    with _blaming(train_file.param):
        train_rows = render_rows(tokenizer, train, settings)
        check_trainable(train_rows, train.name, settings)
    validation_rows: Sequence[Any] = []
    if validation:
        with _blaming(validation_param):
            validation_rows = render_rows(tokenizer, validation, settings)
    reference = DataReference(
        train_sha256=train.sha256,
        num_train_rows=len(train.rows),
        validation_sha256=validation.sha256 if validation else None,
        num_validation_rows=len(validation.rows) if validation else 0,
        validation_share=share,
    )
    rows = [numbered.row for numbered in (validation or train).rows]
    return RenderedData(
        train_rows,
        validation_rows,
        reference,
        sampled=_sampled_prompts(tokenizer, rows, settings),
        judged=make_prompts(tokenizer, rows, limit=settings.gate_samples),
        asked=prompts_of(numbered.row for numbered in train.rows) if settings.keep_prompts else [],
    )


def _sampled_prompts(tokenizer: Any, rows: Sequence[Row], settings: TrainSettings) -> list[SamplePrompt]:
    if settings.sample_file is None:
        return make_prompts(tokenizer, rows, limit=settings.sample_prompts)
    return read_prompts(tokenizer, Path(settings.sample_file))


def _inspect(
    train: Dataset,
    validation: Dataset | None,
    params: tuple[str, str],
    tokenizer: Any,
    settings: TrainSettings,
    listener: DataListener,
) -> None:
    """Refuse data that can't be trained on, and tell the listener what its owner should know of it."""
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
