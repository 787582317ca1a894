"""`hotswap train`: a QLoRA job in this process, with a progress bar, ending in a published version."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from clients.cli.options import BaseOption, DeviceOption, HomeOption, JsonOption, load_core
from clients.cli.output import console, error_console, format_loss, make_table, print_json
from clients.cli.settings_flags import with_settings
from training.config import TrainSettings

if TYPE_CHECKING:
    from rich.console import Console

    from training.worker import TrainingResult

__all__ = ["train"]

_DataOption = Annotated[Path, typer.Option("--data", help='JSONL file, one {"messages": [...]} a line.')]
_ValidationOption = Annotated[
    Path | None, typer.Option("--validation", help="JSONL file for the loss before and after.")
]


@with_settings(TrainSettings)
def train(
    alias: Annotated[str, typer.Argument(help="Name to publish under, for example legal.")],
    data: _DataOption,
    flags: dict[str, Any],
    validation: _ValidationOption = None,
    promote: Annotated[bool, typer.Option(help="Let the alias point to the new version.")] = True,
    home: HomeOption = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train an adapter on chat rows and publish it as the next version of ALIAS."""
    core = load_core(home, base=base, device=device)
    from training.formats import read_chat_dataset

    settings = TrainSettings.load(core.home, **flags)
    # Importing the trainer takes seconds: bad data is reported before.
    for path in filter(None, (data, validation)):
        read_chat_dataset(path)
    # The training libraries warn about their own future arguments; nobody who trains can act on that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from training.worker import run_training

    with ProgressView(alias, error_console if json else console) as view:
        result = run_training(alias, data, validation, core=core, settings=settings, promote=promote, listener=view)
    if json:
        print_json(result)
    else:
        _print_result(result)


class ProgressView:
    """Shows a run's stages as lines and its steps as a bar with the time left."""

    def __init__(self, alias: str, output: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as TimeLeft

        self._alias = alias
        self._output = output
        self._progress = Progress(
            TextColumn("  [bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeLeft(),
            console=output,
        )
        self._task: int | None = None

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._progress.stop()

    def on_stage(self, message: str) -> None:
        """Print a line for a new stage."""
        self._output.print(f"  {self._alias}: {message}")

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Move the bar."""
        from rich.progress import TaskID

        if self._task is None:
            self._task = self._progress.add_task(self._alias, total=num_steps, loss=loss)
        self._progress.update(TaskID(self._task), completed=step, loss=loss)


def _print_result(result: TrainingResult) -> None:
    rows = [
        ("rows", result.num_rows),
        ("steps", result.num_steps),
        ("training time", f"{result.train_seconds:.0f} s, {result.tokens_per_second:.0f} tokens/s"),
        ("validation loss before", format_loss(result.validation_loss_before)),
        ("validation loss after", format_loss(result.validation_loss_after)),
        ("digest", result.published.version.digest[:12]),
    ]
    console.print(make_table(["", result.published.label], rows))
    alias, label = result.published.alias, result.published.label
    if result.is_live:
        console.print(f'{alias} answers with {label} now. Try: hotswap chat {alias} "..." (with hotswap serve running)')
    else:
        console.print(f"{label} is published; {alias} still answers as before. Try: hotswap adapters promote {label}")
