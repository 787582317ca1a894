"""The data of a run as a command names it: read and checked before anything heavy is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import ConfigurationError, DataError
from adapters.methods import Method
from clients.cli.options import reading_flags
from clients.cli.output import error_console

if TYPE_CHECKING:
    from training.formats import Dataset, ReadOptions

__all__ = ["DataSources", "advised", "check_share", "read_source", "summarise"]


@dataclass(frozen=True, slots=True)
class DataSources:
    """What is trained on and what is validated with, if anything, and how each is read."""

    data: Path
    options: ReadOptions
    validation: Path | None
    validation_options: ReadOptions

    @property
    def given(self) -> list[tuple[Path, ReadOptions]]:
        """The training data, and what is validated with if anything is."""
        train = [(self.data, self.options)]
        return train if self.validation is None else [*train, (self.validation, self.validation_options)]

    def read(self, method: Method, command: str) -> None:
        """Read all rows, and say what was recognised; `command` is what an error in rows advises.

        Raises:
            DataError: a source can't be read, has bad rows, or rows that the method does not take.
        """
        from training.kinds import check_kind

        for source, options in self.given:
            check_kind(read_source(source, options, command), method)

    def check_command(self, home: Path | None, base: str | None, given: Mapping[str, Any]) -> str:
        """The command that looks at this data with the options and the settings of this run."""
        names = ("method", "max_length", "max_answer_tokens", "reward", "validation_share")
        more = {
            "validation": self.validation,
            "validation-split": self.validation_options.split,
            "home": home,
            "base": base,
            **{name.replace("_", "-"): given.get(name) for name in names},
        }
        flags = [part for name, value in more.items() if value for part in (f"--{name}", str(value))]
        return shlex.join(["hotswap", "data", "check", str(self.data), *reading_flags(self.options), *flags])


def check_share(data: Path | str, validation: Path | str | None, share: float | None) -> None:
    """Refuse to hold rows out where there are others to validate with.

    Raises:
        ConfigurationError: both are given.
    """
    if validation is not None and share is not None:
        raise ConfigurationError(
            f"validation_share holds out rows of {data}, but {validation} is given to validate with: give one of both"
        )


def summarise(dataset: Dataset) -> str:
    """How many rows a source has, and as what they were read."""
    return f"{dataset.name}: {len(dataset.rows)} rows; {dataset.recognised}"


@contextmanager
def advised(command: str, params: tuple[str | None, ...] = (None,)) -> Iterator[None]:
    """Say beside errors in rows what shows all of them; an error in the file of prompts, say, is of another param."""
    try:
        yield
    except DataError as error:
        if error.param in params:
            error.add_note(f"every problem, and how to leave rows out: {command}")
        raise


def read_source(source: Path, options: ReadOptions, command: str) -> Dataset:
    """Read all rows of one source, and say what was recognised; `command` is what an error in rows advises.

    Raises:
        DataError: it can't be read, or has bad rows.
    """
    from training.formats import read_rows

    found = read_rows(source, options)
    with advised(command):
        dataset = found.as_dataset()
    error_console.print(summarise(dataset), markup=False, soft_wrap=True)
    return dataset
