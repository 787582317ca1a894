"""Makes a flag of every setting, so that a setting is declared and described in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from adapters.settings import SettingsSection

__all__ = ["with_settings"]

_REPLACED = "flags"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def with_settings(section: type[SettingsSection]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag a setting; it gets those that were given as a mapping, its parameter `flags`.

    Checking is left to the section: what the file or the environment may not say, a flag may not say either.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        settings = list(_parameters(section))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in settings}
            # Typer gives an empty list for a flag that may be repeated and was not given.
            command(**values, flags={name: value for name, value in given.items() if value not in (None, [])})

        kept = [parameter.replace(kind=_KEYWORD) for name, parameter in own.parameters.items() if name != _REPLACED]
        first = [parameter for parameter in kept if parameter.default is inspect.Parameter.empty]
        last = [parameter for parameter in kept if parameter not in first]
        run.__signature__ = own.replace(parameters=[*first, *settings, *last])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def _parameters(section: type[SettingsSection]) -> Iterator[inspect.Parameter]:
    for name, field in section.model_fields.items():
        if name in SettingsSection.model_fields:
            continue
        option = typer.Option(help=field.description, show_default=_shown(field.default))
        yield inspect.Parameter(
            name, _KEYWORD, default=None, annotation=Annotated[_flag_type(field.annotation), option]
        )


def _flag_type(annotation: Any) -> Any:
    """What the command line reads for a setting: its type or None; a list where the setting holds several values."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    inner = next(member for member in members if member is not NoneType)
    if get_origin(inner) is tuple:
        inner = list[get_args(inner)[0]]  # type: ignore[misc]
    if get_origin(inner) is Literal and not all(isinstance(value, str) for value in get_args(inner)):
        raise TypeError(f"{inner} can't be read from a command line")
    return inner | None


def _shown(default: Any) -> str | bool:
    if default is None or default == ():
        return False
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
