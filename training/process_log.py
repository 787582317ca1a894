"""How the supervisor and the trainers of jobs log: key-value lines on standard error, tracebacks without variables."""

from __future__ import annotations

import sys

import structlog

__all__ = ["configure_process_log"]


def configure_process_log() -> None:
    """Set up logging for this process."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
