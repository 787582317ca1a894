"""How every process of Hotswap logs: key-value lines on standard error, one an event, from a level on."""

from __future__ import annotations

import logging
import os
import sys

import structlog

__all__ = ["configure_log", "log_environment"]

_VARIABLE = "_HOTSWAP_LOG_LEVEL"
_DEFAULT_LEVEL = "info"


def configure_log(level: str | None = None) -> None:
    """Set up logging for this process; tracebacks come without the values of variables.

    Without a level it is that of the process which started this one with `log_environment`, or `info`.
    """
    chosen = level or os.environ.get(_VARIABLE, _DEFAULT_LEVEL)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[chosen.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def log_environment(level: str) -> dict[str, str]:
    """What to add to the environment of a child, and of its children, that are to log from this level on."""
    return {_VARIABLE: level}
