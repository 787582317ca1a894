"""Options that several commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from adapters.experiment_evaluation import ExperimentEvaluation
    from adapters.registry import Registry
    from adapters.settings import CoreSettings
    from training.formats import ReadOptions

__all__ = [
    "BaseOption",
    "DeviceOption",
    "EncodingOption",
    "HomeOption",
    "JoinTurnsOption",
    "JsonOption",
    "MapOption",
    "RolesOption",
    "SplitOption",
    "SubsetOption",
    "UrlOption",
    "ValidationSplitOption",
    "load_core",
    "open_evaluation",
    "open_registry",
    "read_options",
    "reading_flags",
]

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", envvar="HOTSWAP_HOME", help="Home folder.", show_default="~/.hotswap"),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        envvar="HOTSWAP_BASE",
        help="Base model: the embedded name, a local folder or a hub id.",
        show_default="smollm2-135m",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", envvar="HOTSWAP_DEVICE", help="auto, cpu, cuda or cuda:N.", show_default="auto"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="TARGET=COLUMN", help="Which column is what: user=question,assistant=answer."),
]
RolesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--roles", metavar="NAME=ROLE", help="Who is who in the messages: customer=user,agent=assistant,bot=assistant."
    ),
]
JoinTurnsOption = Annotated[
    bool,
    typer.Option(
        "--join-turns",
        help="Join what one speaker says in a row; drop what the assistant says first and the user last.",
    ),
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Which split, of a source that has several.")]
SubsetOption = Annotated[str | None, typer.Option("--subset", help="Which configuration, of a data set on the hub.")]
EncodingOption = Annotated[
    str | None,
    typer.Option("--encoding", help="Of a text file: cp1252 for most files from Windows.", show_default="utf-8"),
]
ValidationSplitOption = Annotated[
    str | None, typer.Option("--validation-split", help="Which split of the validation data.")
]
UrlOption = Annotated[str, typer.Option("--url", envvar="HOTSWAP_URL", help="Where the server listens.")]


def load_core(home: Path | None, *, base: str | None = None, device: str | None = None) -> CoreSettings:
    """Resolve the core settings: flag, environment, file, default."""
    from adapters.settings import CoreSettings, resolve_home

    return CoreSettings.load(resolve_home(home), base=base, device=device)


def open_registry(home: Path | None) -> Registry:
    """Open the registry of a home folder, creating it where needed."""
    from adapters.database import open_database
    from adapters.registry import Registry
    from adapters.store import ArtifactStore

    core = load_core(home)
    core.home.mkdir(parents=True, exist_ok=True)
    return Registry(open_database(core.resolved_database_url), ArtifactStore(core.home / "store"))


def open_evaluation(home: Path | None) -> ExperimentEvaluation:
    """What reads and decides experiments, as the server of this home would: feedback is taken for as long there."""
    from datetime import timedelta

    from adapters.experiment_evaluation import ExperimentEvaluation
    from adapters.settings import resolve_home
    from server.config import ServeSettings

    days = ServeSettings.load(resolve_home(home)).feedback_days
    return ExperimentEvaluation(open_registry(home), feedback_window=timedelta(days=days))


def read_options(
    mapping: list[str] | None,
    split: str | None,
    subset: str | None,
    encoding: str | None,
    roles: list[str] | None = None,
    *,
    join_turns: bool = False,
) -> ReadOptions:
    """What the flags say of how a source is to be read."""
    from training.formats import ReadOptions
    from training.recognise import parse_mapping
    from training.speakers import parse_roles

    return ReadOptions(parse_mapping(mapping or []), split, subset, encoding, parse_roles(roles or []), join_turns)


def reading_flags(options: ReadOptions) -> list[str]:
    """The same flags again, for a command that reads a source as this one did."""
    given = {
        "--map": ",".join(f"{target}={column}" for target, column in (options.mapping or {}).items()),
        "--roles": ",".join(f"{name}={role}" for name, role in (options.roles or {}).items()),
        "--split": options.split,
        "--subset": options.subset,
        "--encoding": options.encoding,
    }
    flags = [part for name, value in given.items() if value for part in (name, value)]
    return [*flags, "--join-turns"] if options.join_turns else flags
