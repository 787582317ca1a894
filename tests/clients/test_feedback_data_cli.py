"""`hotswap data from-feedback` in process, on to a check and a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from adapters.conversations import Conversation, ConversationLog
from adapters.database import Database
from adapters.errors import ConflictError, InvalidInputError, NotFoundError
from adapters.experiments import ExperimentService
from adapters.records import Binding, Exposure, Feedback
from adapters.rows_file import check_rows_file
from clients.cli.main import app


@pytest.fixture
def base(tiny_folders: dict[str, Path]) -> tuple[str, str]:
    """The option that names a tiny base model."""
    return "--base", str(tiny_folders["llama"])


def _rate(database: Database, name: str, prompt: str, answer: str, value: float, **feedback: Any) -> None:
    """A conversation that the server would have kept, and what its user said."""
    service = ExperimentService(database)
    binding = Binding("legal", "alias", "d" * 64, 1)
    service.record_exposure(Exposure(name, binding, "u", "user", 5, 7, 1.5, 9.5, "stop", None))
    question, message = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    assert ConversationLog(database).keep(Conversation(name, [question], [], [message]))
    service.record_feedback(Feedback(name, "helpful", value))
    for metric, comment in feedback.items():
        service.record_feedback(Feedback(name, metric, 1.0, comment))


def _run(home: Path, *arguments: str) -> Result:
    environment = {"HOTSWAP_HOME": str(home), "HOTSWAP_QUANTISATION": "none", "COLUMNS": "200", "NO_COLOR": "1"}
    result = CliRunner().invoke(app, arguments, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_feedback_becomes_a_version_when_its_rows_are_trained_on(
    tmp_path: Path, database: Database, base: tuple[str, str]
) -> None:
    """The loop: rated answers, rows that the check and an upload take, a run, a version."""
    for number in range(3):
        _rate(database, f"chatcmpl-{number}", f"question {number}", "write to ann@example.com", float(number > 0))
    rows = tmp_path / "rows.jsonl"
    command = ("data", "from-feedback", "legal", "--metric", "helpful", "--output", str(rows), *base)
    made = _run(tmp_path, *command)
    assert (0, True) == (made.exit_code, f"2 chat rows written to {rows}" in made.stdout), made.output
    assert "left out: 1, rated, but not as good" in made.stdout
    assert "likely personal data, e-mail address: 2 found" in made.stdout
    assert "rows that equal an earlier one in 80% of their text or more: 1" in made.stdout
    assert 2 == check_rows_file(rows).num_rows
    checked = _run(tmp_path, "data", "check", str(rows), *base)
    assert (0, True) == (checked.exit_code, "errors: 0" in checked.stdout), checked.output
    trained = _run(tmp_path, "train", "legal", "--data", str(rows), *base, "--max-steps", "1", "--json")
    assert "legal@v1" == json.loads(trained.stdout)["published"]["label"]
    with pytest.raises(ConflictError, match="exists already"):
        _run(tmp_path, *command)


def test_pairs_become_preference_rows_when_one_prompt_was_answered_twice(
    tmp_path: Path, database: Database, base: tuple[str, str]
) -> None:
    """Answers of two values, and an edit with the answer that it mends."""
    _rate(database, "chatcmpl-1", "q", "good", 1.0)
    _rate(database, "chatcmpl-2", "q", "bad", 0.0)
    _rate(database, "chatcmpl-3", "other", "poor", 0.0, edit="mended")
    rows = tmp_path / "rows.jsonl"
    options = ("--metric", "helpful", "--kind", "preference", "--edits", "edit", "--output", str(rows))
    made = _run(tmp_path, "data", "from-feedback", "legal", *options, *base)
    assert f"2 preference rows written to {rows}" in made.stdout, made.output
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [("good", "bad"), ("mended", "poor")] == [
        (row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs
    ]
    checked = _run(tmp_path, "data", "check", str(rows), "--method", "dpo", *base)
    assert (0, True) == (checked.exit_code, "errors: 0" in checked.stdout), checked.output


def test_nothing_is_written_when_there_is_no_such_feedback(tmp_path: Path, database: Database) -> None:
    """The error says what there is, and how conversations come to be kept."""
    _rate(database, "chatcmpl-1", "q", "a", 0.0)
    rows = tmp_path / "rows.jsonl"
    command = ("data", "from-feedback", "legal", "--output", str(rows), "--metric")
    with pytest.raises(NotFoundError, match=r"there is: helpful \(1\).*--keep-conversations"):
        _run(tmp_path, *command, "solved")
    with pytest.raises(NotFoundError, match="no chat row came"):
        _run(tmp_path, *command, "helpful")
    _rate(database, "chatcmpl-2", "q", "a", 4.0)
    with pytest.raises(InvalidInputError, match="values from 0 to 4"):
        _run(tmp_path, *command, "helpful")
    assert not rows.exists()
