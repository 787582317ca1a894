"""Makes a flag of every setting, so that a setting is declared and described in one place."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from adapters.settings import CONFIG_FILE_NAME, SettingsSection

__all__ = ["panelled", "with_settings"]

_REPLACED = "flags"
_OTHERS = "Other options"
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


def panelled(section: type[SettingsSection], first: tuple[str, Sequence[str]] | None = None) -> type[TyperCommand]:
    """A command whose help has the settings in a panel of their own, at its end, and no names of variables.

    Names of variables would be cut to nothing; docs/configuration.md has them all.

    Args:
        section: Whose settings the command takes.
        first: The title of the panel that the help begins with, and the options that stand there.
    """
    title, leading = first or ("", ())
    settings = f"Settings, also of {CONFIG_FILE_NAME} and the environment: docs/configuration.md"
    order = [title, _OTHERS, settings]

    class PanelledCommand(TyperCommand):
        """Sorts its options into the panels."""

        def get_params(self, ctx: Any) -> list[Any]:
            """All of them, that for help included."""
            params = super().get_params(ctx)
            for param in params:
                if isinstance(param, TyperOption):
                    is_setting = param.name in section.model_fields and param.name not in SettingsSection.model_fields
                    own = settings if is_setting else _OTHERS
                    param.rich_help_panel = title if param.name in leading else own
                    param.show_envvar = False
            return sorted(params, key=_place)

    def _place(param: Any) -> tuple[int, int]:
        panel = getattr(param, "rich_help_panel", None) or _OTHERS  # an argument has a panel of its own
        return order.index(panel), leading.index(param.name) if param.name in leading else 0

    return PanelledCommand


def _parameters(section: type[SettingsSection]) -> Iterator[inspect.Parameter]:
    for name, field in section.model_fields.items():
        if name in SettingsSection.model_fields:
            continue
        shown = "by method" if field.default_factory else _shown(field.default)
        option = typer.Option(help=field.description, show_default=shown)
        yield inspect.Parameter(
            name, _KEYWORD, default=None, annotation=Annotated[_flag_type(field.annotation), option]
        )


def _flag_type(annotation: Any) -> Any:
    """What the command line reads for a setting: its type or None; a list where the setting holds several values."""
    annotation = _plain(annotation)
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    inner = _plain(next(member for member in members if member is not NoneType))
    if get_origin(inner) is tuple:
        member = _plain(get_args(inner)[0])
        # Typer reads no list of choices; the section checks each.
        inner = list[str] if get_origin(member) is Literal else list[member]  # type: ignore[valid-type]
    if get_origin(inner) is Literal and not all(isinstance(value, str) for value in get_args(inner)):
        raise TypeError(f"{inner} can't be read from a command line")
    return inner | None


def _plain(annotation: Any) -> Any:
    """A type without the constraints that are written beside it."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _shown(default: Any) -> str | bool:
    if default is None or default == ():
        return False
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
