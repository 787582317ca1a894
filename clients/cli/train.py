"""`hotswap train`: a QLoRA job in this process, with a progress bar, ending in a published version."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer
from rich.markup import escape

from adapters.errors import ConfigurationError, InvalidNameError
from adapters.methods import Method
from adapters.records import check_alias_name
from clients.cli.data_sources import DataSources, advised, check_share
from clients.cli.options import (
    BaseOption,
    DeviceOption,
    EncodingOption,
    HomeOption,
    JoinTurnsOption,
    JsonOption,
    MapOption,
    RolesOption,
    SplitOption,
    SubsetOption,
    ValidationSplitOption,
    load_core,
    read_options,
)
from clients.cli.output import (
    console,
    error_console,
    format_loss,
    format_seconds,
    make_table,
    print_gate,
    print_json,
    print_live,
)
from clients.cli.plots import print_curves
from clients.cli.settings_flags import with_settings
from training.config import TrainSettings
from training.run_file import RunFile, read_run_file
from training.run_log import PUBLISHING, name_run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from adapters.settings import CoreSettings
    from training.progress import StepMetrics
    from training.worker import TrainingResult

__all__ = ["DATA_OPTIONS", "train"]

# What is read, and how: the help begins with them.
DATA_OPTIONS = (
    *("data", "validation", "validation_share", "mapping", "roles"),
    *("split", "validation_split", "subset", "encoding", "config"),
)

_DataOption = Annotated[
    Path | None, typer.Option("--data", help="A file (JSONL, JSON, CSV, TSV, Parquet), a folder, or a hub id.")
]
_ValidationOption = Annotated[
    Path | None, typer.Option("--validation", help="The same, for the loss before and after.")
]
_ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file of the run: alias, data, validation, settings. Flags win.")
]


@with_settings(TrainSettings)
def train(
    flags: dict[str, Any],
    alias: Annotated[str | None, typer.Argument(help="Name to publish under, for example legal.")] = None,
    data: _DataOption = None,
    config: _ConfigOption = None,
    validation: _ValidationOption = None,
    mapping: MapOption = None,
    roles: RolesOption = None,
    join_turns: JoinTurnsOption = False,
    split: SplitOption = None,
    validation_split: ValidationSplitOption = None,
    subset: SubsetOption = None,
    encoding: EncodingOption = None,
    no_promote: Annotated[bool, typer.Option("--no-promote", help="The same as --promote never.")] = False,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train an adapter and publish it as the next version of ALIAS.

    By --method: on chat rows (sft), pairs (dpo, reward), labels (kto) or rewards (rloo, grpo).
    """
    core = load_core(home, base=base, device=device)
    run = read_run_file(config) if config else RunFile()
    alias, data, validation = alias or run.alias, data or run.data, validation or run.validation
    if alias is None or data is None:
        missing = "an ALIAS to publish under" if alias is None else "--data"
        raise ConfigurationError(f"{missing} is needed, by flag or in the file of --config")
    _check_alias(alias)
    given = run.settings | flags | ({"promote": "never"} if no_promote else {})
    check_share(data, validation, given.get("validation_share"))
    settings = _load_settings(core.home, config, given)
    options = read_options(
        mapping or run.mapping,
        split or run.split,
        subset or run.subset,
        encoding or run.encoding,
        roles or run.roles,
        join_turns=join_turns or run.join_turns,
    )
    validation_options = replace(options, split=validation_split or run.validation_split)
    sources = DataSources(data, options, validation, validation_options)
    with ProgressView(alias, error_console if json else console, name_run_folder(core.home)) as view:
        result = _train(alias, sources, core, settings, sources.check_command(home, base, given), view)
    if json:
        print_json(result)
    else:
        _print_result(result, settings.method)


def _check_alias(alias: str) -> None:
    """Refuse a name before anything is read; a note says which name like it would do."""
    try:
        check_alias_name(alias)
    except InvalidNameError as error:
        similar = re.sub(r"[^a-z0-9._-]+", "-", alias.lower()).strip("._-")[:63]
        with suppress(InvalidNameError):
            error.add_note(f"{check_alias_name(similar)} would do")
        raise


def _train(
    alias: str, sources: DataSources, core: CoreSettings, settings: TrainSettings, command: str, view: ProgressView
) -> TrainingResult:
    """Read and check the rows, and only then import the trainer, which takes seconds; `command` shows bad rows."""
    sources.read(settings.method, command)
    # The training libraries warn about their own future arguments; nobody who trains can act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from training.worker import run_training

    view.on_stage(f"Metrics and sampled answers go to {view.folder}")
    with advised(command, params=("data", "validation")):
        return run_training(
            alias,
            sources.data,
            sources.validation,
            core=core,
            settings=settings,
            listener=view,
            options=sources.options,
            validation_options=sources.validation_options,
            folder=view.folder,
        )


def _load_settings(home: Path, config: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    try:
        return TrainSettings.load(home, **given)
    except ConfigurationError as error:
        if config is None:
            raise
        raise ConfigurationError(f"{config}, with the flags given: {error}") from None


class ProgressView:
    """Shows a run's stages as lines and its steps as a bar with the time left; without a terminal, as ten lines.

    A run that is interrupted ends with a line that says how far it came and what is left of it in `folder`.
    """

    def __init__(self, alias: str, output: Console, folder: Path) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        self._alias = alias
        self._output = output
        self.folder = folder
        self._progress = Progress(
            TextColumn("  [bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            console=output,
            disable=not output.is_terminal,
        )
        self._task: int | None = None
        self._reached: tuple[int, int] | None = None
        self._first: tuple[int, float] | None = None
        self._is_publishing = False

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._progress.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._output.print(f"  {self._alias}: {self._describe_stop()}", markup=False, soft_wrap=True)

    def on_stage(self, message: str) -> None:
        """Print a line for a new stage."""
        self._is_publishing = message == PUBLISHING
        self._output.print(f"  {self._alias}: {escape(message)}", soft_wrap=True)

    def on_evaluation(self, metrics: StepMetrics, evaluation: Any) -> None:
        """Print a line for what was measured on the validation rows."""
        parts = [f"validation loss {evaluation.loss:.3f}"]
        if evaluation.accuracy is not None:
            parts.append(f"token accuracy {evaluation.accuracy:.0%}")
        parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in evaluation.extra.items()]
        self._output.print(f"  {self._alias}: step {metrics.step}: {', '.join(parts)}")

    def on_warning(self, message: str) -> None:
        """Print what is wrong."""
        self._output.print(f"  {self._alias}: warning: {message}", style="yellow", markup=False)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Move the bar; without a terminal print a line at the first step and at each tenth of the run."""
        from rich.progress import TaskID

        self._reached = (step, num_steps)
        if not self._output.is_terminal and (step in (1, num_steps) or step % -(-num_steps // 10) == 0):
            line = f"step {step} of {num_steps}, loss {loss:.3f}{self._describe_time_left(step, num_steps)}"
            self._output.print(f"  {self._alias}: {line}", soft_wrap=True)
        if self._task is None:
            self._task = self._progress.add_task(self._alias, total=num_steps, loss=loss)
        self._progress.update(TaskID(self._task), completed=step, loss=loss)

    def _describe_time_left(self, step: int, num_steps: int) -> str:
        first_step, started = self._first = self._first or (step, time.monotonic())
        if step in (first_step, num_steps):
            return ""
        seconds = (time.monotonic() - started) / (step - first_step) * (num_steps - step)
        return f", about {format_seconds(seconds)} left"

    def _describe_stop(self) -> str:
        if self._is_publishing:
            return f"stopped while publishing; hotswap adapters show {self._alias} says whether there is a new version"
        if self._reached is None:
            return "stopped before the first step; nothing was published"
        step, num_steps = self._reached
        return f"stopped at step {step} of {num_steps}; nothing was published; metrics are in {self.folder}"


def _print_result(result: TrainingResult, method: Method) -> None:
    rows = [
        ("rows", result.num_rows),
        ("steps", result.num_steps),
        ("training time", f"{result.train_seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s"),
        ("validation loss before", format_loss(result.validation_loss_before)),
        ("validation loss after", format_loss(result.validation_loss_after)),
        ("best step", result.best_step),
        ("digest", result.published.version.digest[:12]),
    ]
    console.print(make_table(["", result.published.label], rows))
    print_curves(result.folder, method)
    print_gate(result.gate)
    if result.remark:
        console.print(f"{result.remark[0].upper()}{result.remark[1:]}.", markup=False, soft_wrap=True)
    console.print(f"metrics, sampled answers and curves are in {result.folder}", soft_wrap=True)
    if result.is_live:
        print_live(result.published)
    else:
        alias, label = result.published.alias, result.published.label
        console.print(f"{label} is published and answers by that name; {alias} was not moved to it.", soft_wrap=True)
        _print_ways_out(result)


def _print_ways_out(result: TrainingResult) -> None:
    """What mends a version that its alias was not moved to, and only then how to move it by hand."""
    cures = [check.cure for check in result.gate.checks if check.cure]
    for cure in cures:
        console.print(f"What usually mends it: {cure}.", markup=False, soft_wrap=True)
    title = "Or, all the same" if cures else "Try"
    console.print(f"{title}: hotswap adapters promote {result.published.label}", soft_wrap=True)
