"""The entry point `hotswap`: joins the commands and turns expected errors into one line and exit code 1."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clients.cli import (
    adapters,
    audit,
    base,
    bench,
    chat,
    data,
    demo,
    doctor,
    experiments,
    feedback_data,
    jobs,
    keys,
    replay,
    route,
    serve,
    shadow,
    train,
)
from clients.cli.settings_flags import panelled
from server.config import ServeSettings
from training.config import TrainSettings

__all__ = ["app", "main", "tell_people"]


class _RootGroup(TyperGroup):
    """Commands whose own options, such as --version, come from no variable: HOTSWAP_VERSION is often an image's tag."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All options of the root, those of Typer's own included."""
        params: list[Any] = list(super().get_params(ctx))
        for param in params:
            param.allow_from_autoenv = False
        return params


app = typer.Typer(
    name="hotswap",
    cls=_RootGroup,
    help="One 4-bit base model, one LoRA adapter per domain, swapped live.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "HOTSWAP", "help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train", cls=panelled(TrainSettings, ("Data", train.DATA_OPTIONS)))(train.train)
data.app.command("from-feedback")(feedback_data.from_feedback)
app.add_typer(data.app, name="data")
app.command("serve", cls=panelled(ServeSettings))(serve.serve)
app.command("chat")(chat.chat)
app.add_typer(adapters.app, name="adapters")
experiments.app.command("replay")(replay.replay)
app.add_typer(experiments.app, name="experiments")
app.add_typer(route.app, name="route")
app.add_typer(shadow.app, name="shadow")
app.add_typer(jobs.app, name="jobs")
app.add_typer(base.app, name="base")
app.add_typer(keys.app, name="keys")
app.command("audit")(audit.audit)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    """One 4-bit base model, one LoRA adapter per domain, swapped live."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"hotswap {installed('hotswap')}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    tell_people()
    try:
        app()
    except Exception as error:
        # The process boundary: what a user can cause is one line; anything else is a defect and keeps its traceback.
        if not _is_expected(error):
            raise
        typer.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        sys.exit(1)


def tell_people() -> None:
    """Show what the packages would log as lines for people, beside what a command prints; a server logs otherwise."""
    import structlog

    structlog.configure(
        processors=[structlog.processors.format_exc_info, _make_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # what it is then: whoever captures it may end
    )


def _make_line(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    more = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("event", "exception"))
    line = f"{event['event']}".replace("_", " ") + (f" ({more})" if more else "")
    return "\n".join([line, *filter(None, [event.get("exception")])])


def _is_expected(error: Exception) -> bool:
    from adapters.errors import HotswapError
    from clients.http import ApiError

    return isinstance(error, HotswapError | ApiError)
