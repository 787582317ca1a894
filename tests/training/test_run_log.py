"""A run's files: whole lines, only JSON, and nothing of steps that are taken again."""

from __future__ import annotations

import json
import math
from pathlib import Path

from training.run_log import METRICS_FILE, SAMPLES_FILE, RunLog, read_lines


def test_lines_come_back_in_order_when_they_were_noted(tmp_path: Path) -> None:
    """What is no finite number is null, which any reader of JSON takes."""
    log = RunLog(tmp_path / "runs" / "one")
    log.note("step", 1, {"train_loss": 2.5, "learning_rate": None})
    log.note("step", 2, {"train_loss": math.nan})
    assert log.lines() == [
        {"kind": "step", "step": 1, "train_loss": 2.5, "learning_rate": None},
        {"kind": "step", "step": 2, "train_loss": None},
    ]


def test_later_lines_are_dropped_when_a_run_goes_on_from_a_step(tmp_path: Path) -> None:
    """Of metrics and samples; another run in the folder of nothing drops all."""
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.note("step", step, {})
        log.note_sample(step, {"answer": "é"})
    resumed = RunLog(tmp_path, resume_step=2)
    assert [line["step"] for line in resumed.lines()] == [1, 2]
    assert [line["step"] for line in read_lines(tmp_path / SAMPLES_FILE)] == [1, 2]
    assert RunLog(tmp_path).lines() == []


def test_cut_line_is_left_out_when_a_kill_came_between(tmp_path: Path) -> None:
    """The line before it is whole."""
    log = RunLog(tmp_path)
    log.note("step", 1, {})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 2})[:9])
    assert [line["step"] for line in RunLog(tmp_path, resume_step=9).lines()] == [1]


def test_cut_letter_is_left_out_when_a_kill_came_in_the_middle_of_its_bytes(tmp_path: Path) -> None:
    """A job that goes on must not fail for half a letter."""
    log = RunLog(tmp_path)
    log.note_sample(1, {"answer": "é"})
    with (tmp_path / SAMPLES_FILE).open("ab") as file:
        file.write('{"answer": "é'.encode()[:-1])
    RunLog(tmp_path, resume_step=9)
    assert ["é"] == [line["answer"] for line in read_lines(tmp_path / SAMPLES_FILE)]
