"""Log lines, and the level that a process takes over from the one which started it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from adapters.process_log import configure_log, log_environment


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    """Undo what a test configures for the process."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_log_line_has_event_level_and_request_when_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """One line in logfmt on standard error, with what is bound to the request."""
    configure_log("info")
    structlog.contextvars.bind_contextvars(request_id="req_1")
    structlog.get_logger().info("chat_answered", version="legal@v2", note="two words")
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    for part in ("level=info", "event=chat_answered", "request_id=req_1", "version=legal@v2", 'note="two words"'):
        assert part in line


def test_log_line_is_left_out_when_its_level_is_too_low(capsys: pytest.CaptureFixture[str]) -> None:
    """The setting is the least level that is written."""
    configure_log("warning")
    log = structlog.get_logger()
    log.info("quiet")
    log.warning("loud")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["event=loud"]


def test_log_line_stays_one_line_when_a_value_holds_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    """A user's text can't forge a second line."""
    configure_log("info")
    structlog.get_logger().info("event", text="a\nlevel=error event=forged")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_level_is_that_of_the_parent_when_none_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's setting reaches the supervisor and its trainers; what a process is told itself counts more."""
    for name, value in log_environment("error").items():
        monkeypatch.setenv(name, value)
    configure_log()
    structlog.get_logger().warning("quiet")
    configure_log("warning")
    structlog.get_logger().warning("loud")
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["event=loud"]
