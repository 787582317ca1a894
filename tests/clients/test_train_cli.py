"""What `hotswap train` shows while a run goes on, and when it is interrupted."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from clients.cli.main import app
from clients.cli.train import ProgressView
from tests.support.conversations import easy_rows, write_rows

FOLDER = Path("runs/run-1")


@pytest.fixture
def output() -> Console:
    """A console that is no terminal, as in a log."""
    return Console(file=io.StringIO(), width=200)


def _lines(output: Console) -> list[str]:
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue().splitlines()


def _interrupt(view: ProgressView, stages: list[str], steps: int) -> None:
    with view:
        for step in range(1, steps + 1):
            view.on_step(step, 40, 2.5)
        for stage in stages:
            view.on_stage(stage)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("num_steps", "shown"), [(40, [1, *range(4, 41, 4)]), (3, [1, 2, 3]), (117, [1, *range(12, 109, 12), 117])]
)
def test_progress_is_a_line_each_tenth_when_there_is_no_terminal(
    output: Console, num_steps: int, shown: list[int]
) -> None:
    """With the loss, and between the first step and the last with the time left."""
    with ProgressView("legal", output, FOLDER) as view:
        for step in range(1, num_steps + 1):
            view.on_step(step, num_steps, 2.5)
    lines = _lines(output)
    assert [f"  legal: step {step} of {num_steps}, loss 2.500" for step in shown] == [
        line.split(", about")[0] for line in lines
    ]
    assert [line.endswith(" left") for line in lines] == [False, *[True] * (len(shown) - 2), False]


def test_progress_is_a_bar_when_there_is_a_terminal() -> None:
    """No lines for steps beside it."""
    output = Console(file=io.StringIO(), width=200, force_terminal=True)
    with ProgressView("legal", output, FOLDER) as view:
        view.on_step(1, 2, 2.5)
        view.on_step(2, 2, 2.5)
    text = "\n".join(_lines(output))
    assert "2/2" in text
    assert "step 1 of 2" not in text


@pytest.mark.parametrize(
    ("stages", "steps", "told"),
    [
        (["Checking the data"], 0, "stopped before the first step; nothing was published"),
        (["Training on 9 rows"], 2, f"stopped at step 2 of 40; nothing was published; metrics are in {FOLDER}"),
        (
            ["Publishing"],
            40,
            "stopped while publishing; hotswap adapters show legal says whether there is a new version",
        ),
    ],
)
def test_stopped_run_says_how_far_it_came_when_it_is_interrupted(
    output: Console, stages: list[str], steps: int, told: str
) -> None:
    """What was published is never denied, and metrics are named where there are some."""
    with pytest.raises(KeyboardInterrupt):
        _interrupt(ProgressView("legal", output, FOLDER), stages, steps)
    assert _lines(output)[-1] == f"  legal: {told}"


def test_failed_run_says_nothing_of_a_stop_when_it_ends_with_an_error(output: Console) -> None:
    """An error has its own words."""
    with pytest.raises(ValueError, match="broken"), ProgressView("legal", output, FOLDER):
        raise ValueError("broken")
    assert _lines(output) == []


def test_train_tells_the_step_and_the_folder_when_it_gets_ctrl_c(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """A real process and a real signal: the folder that it names holds the steps, and no version is there."""
    data = write_rows(tmp_path / "rows.jsonl", easy_rows(8))
    places = {"HOTSWAP_HOME": str(tmp_path / "home"), "HOTSWAP_BASE": str(tiny_folders["llama"]), "COLUMNS": "200"}
    flags = ["--max-steps", "100000", "--rank", "2", "--sample-prompts", "0", "--eval-steps", "100000"]
    command = [sys.executable, "-m", "clients.cli", "train", "legal", "--data", str(data), *flags]
    process = subprocess.Popen(
        command,
        env=os.environ | places | {"HOTSWAP_QUANTISATION": "none", "HOTSWAP_DEVICE": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell tells its background jobs to ignore Ctrl-C, and their children with them: the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 150
        while (
            not (has_begun := any((tmp_path / "home").glob("runs/*/metrics.jsonl")))
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert has_begun, printed
    (folder,) = (tmp_path / "home" / "runs").iterdir()
    assert f"Metrics and sampled answers go to {folder}" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("  legal: stopped at step "), printed
    assert last.endswith(f" of 100000; nothing was published; metrics are in {folder}")
    assert process.returncode == 130
    assert not list((tmp_path / "home").glob("store/*"))


@pytest.mark.parametrize(("command", "first"), [("train", "Data"), ("serve", "Other options")])
def test_help_begins_with_what_is_needed_first_when_asked_for(command: str, first: str) -> None:
    """The settings come last, without the names of variables, which still count."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"}).stdout
    panels = [line.split("─ ")[1].split(" ─")[0] for line in shown.splitlines() if line.startswith("╭─")]
    assert first == next(panel for panel in panels if panel != "Arguments")
    assert panels[-1].startswith("Settings, also of hotswap.toml and the environment")
    assert "HOTSWAP" not in shown
    options = [line.split()[1] for line in shown.splitlines() if line.startswith("│ --")]
    assert ("--data" if command == "train" else "--home") == options[0]
    assert len(options) > 20


def test_setting_is_read_from_its_variable_when_the_help_does_not_name_it(tmp_path: Path) -> None:
    """As before."""
    environment = {"HOTSWAP_HOME": str(tmp_path), "HOTSWAP_TRAIN_RANK": "0"}
    result = CliRunner().invoke(app, ["train", "legal", "--data", "rows.jsonl"], env=environment)
    assert "rank" in str(result.exception)
