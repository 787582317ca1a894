"""The settings of the server: `[serve]` in hotswap.toml, `HOTSWAP_SERVE_*`, or flags of `hotswap serve`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from adapters.errors import ConfigurationError
from adapters.records import ApiKey
from adapters.settings import SettingsSection, split_names

__all__ = ["ServeSettings", "check_bind", "check_port"]

_DEFAULT_CACHE_TOKENS = 32_768


class ServeSettings(SettingsSection):
    """Where to listen, and how much to take on."""

    model_config = SettingsConfigDict(env_prefix="HOTSWAP_SERVE_", extra="forbid", frozen=True)
    table: ClassVar[str | None] = "serve"

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = Field(  # noqa: S104 - the user's choice, loopback by default
        "127.0.0.1",
        description="Address to listen on; anything but loopback takes an API key.",
    )
    port: int = Field(8000, ge=1024, le=65535, description="Port to listen on.")
    slots: int = Field(8, ge=1, le=256, description="Adapters on the device at once, besides the base model.")
    max_batch: int = Field(32, ge=1, le=512, description="Requests computed at once.")
    max_context: int = Field(2048, ge=64, le=131_072, description="Prompt and answer together, in tokens.")
    max_tokens: int = Field(512, ge=1, le=131_072, description="Answer's length where a request gives none.")
    max_prefill_tokens: int = Field(256, ge=16, le=65_536, description="Prompt tokens computed in one step.")
    max_stall_ms: int = Field(
        200, ge=1, le=60_000, description="How long reading a prompt may hold up running streams at a time, about."
    )
    cache_tokens: int | None = Field(
        None,
        ge=64,
        le=100_000_000,
        description="Tokens that the KV cache holds, those of all running requests together.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="Processor threads of the engine; one less than there are cores if not set."
    )
    native_kernels: bool = Field(
        True, description="Compile the decode step's inner loops for this CPU at the first start, if it has a compiler."
    )
    capture_decode: bool = Field(
        True, description="Capture decode steps as CUDA graphs at the start; without effect on a CPU."
    )
    max_waiting: int = Field(256, ge=1, le=100_000, description="Requests in flight before new ones get 429.")
    max_queued_tokens: int = Field(
        200_000,
        ge=64,
        le=1_000_000_000,
        description="Prompt and answer tokens of the requests in flight before new ones get 429.",
    )
    timeout_s: float = Field(
        600.0,
        ge=0.1,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds an answer may take, from the queue to its end.",
    )
    send_timeout_s: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds for which a client may take nothing of its answer before its connection is cut.",
    )
    drain_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        description="Seconds that running answers get to end after SIGTERM or Ctrl+C.",
    )
    max_body_bytes: int = Field(2_000_000, ge=1000, le=1_000_000_000, description="Largest request body.")
    max_adapter_bytes: int = Field(
        1_000_000_000, ge=1000, le=17_179_869_184, description="Largest upload of an adapter."
    )
    host_cache_mb: int = Field(
        1024, ge=0, le=1_048_576, description="Megabytes of host memory for adapters that lost their slot; 0 is off."
    )
    pinned: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Aliases whose versions keep a slot, from the start and wherever the aliases move."
    )
    jobs: bool = Field(True, description="Train fine-tuning jobs beside serving, one at a time.")
    job_threads: int = Field(1, ge=1, le=1024, description="Processor threads of a job, which runs at low priority.")
    job_share: float = Field(
        0.25,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Part of the time in which a job computes while answers are written; 1: jobs never give way.",
    )
    max_queued_jobs: int = Field(
        100, ge=1, le=10_000, description="Fine-tuning jobs that may wait, and as many that may be paused; then 429."
    )
    max_file_bytes: int = Field(
        100_000_000, ge=1000, le=10_000_000_000, description="Largest file that may be uploaded."
    )
    route_threshold: float = Field(
        0.5,
        ge=0.01,
        le=0.99,
        allow_inf_nan=False,
        description="Least probability by which the router chooses an alias; below it the base model answers.",
    )
    feedback_days: float = Field(
        7.0, ge=0.01, le=3650, allow_inf_nan=False, description="Days after an answer in which feedback on it is taken."
    )
    experiment_interval_s: float = Field(
        60.0,
        ge=0.1,
        le=86_400,
        allow_inf_nan=False,
        description="Seconds between two evaluations of running experiments: the longest that a rollback takes.",
    )
    keep_conversations: bool = Field(
        False,
        description="Keep what is asked and answered in chats, for training and comparisons; store: false is not.",
    )
    conversation_days: int = Field(30, ge=1, le=3650, description="Days after which a kept conversation is deleted.")
    conversation_mb: int = Field(
        1024, ge=1, le=1_048_576, description="Megabytes of kept conversations; beyond it the oldest go."
    )
    traces: bool = Field(False, description="Send OpenTelemetry spans, one an answer; OTEL_* variables say where to.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("pinned", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return split_names(value)

    @model_validator(mode="after")
    def _check_pins(self) -> Self:
        if self.pinned and len(self.pinned) >= self.slots:
            raise ValueError(f"pinned names {len(self.pinned)} aliases, but of {self.slots} slots one must stay free")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_queued_tokens < self.max_context:
            raise ValueError(
                f"max_queued_tokens ({self.max_queued_tokens}) must not be less than max_context ({self.max_context}), "
                "or the longest request is never taken"
            )
        if self.max_tokens >= self.max_context:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be less than max_context ({self.max_context})")
        if self.cache_tokens is not None and self.cache_tokens < self.max_context:
            raise ValueError(
                f"cache_tokens ({self.cache_tokens}) must be at least max_context ({self.max_context}): "
                "the longest request has to fit"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether the server can be reached from this machine alone."""
        return self.host == "127.0.0.1"

    @property
    def address(self) -> str:
        """Where this machine reaches the server: http://127.0.0.1:8000."""
        return f"http://{'[::1]' if self.host == '::' else '127.0.0.1'}:{self.port}"

    @property
    def resolved_cache_tokens(self) -> int:
        """What is set; otherwise room for 32,768 tokens, or for one longest request where that is more."""
        return max(_DEFAULT_CACHE_TOKENS, self.max_context) if self.cache_tokens is None else self.cache_tokens

    @property
    def resolved_threads(self) -> int:
        """What is set; otherwise all cores but one, which the API process and the loader need.

        A thread team that has to share a core waits for its slowest member hundreds of times a step: with two threads
        on two cores beside an API process and a client, 8 streams were slower than with one (docs/decisions/0006).
        """
        # macOS has no affinity.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores - 1) if self.threads is None else self.threads


def check_bind(settings: ServeSettings, keys: Iterable[ApiKey]) -> None:
    """Refuse to listen where others can reach the server while there is no valid key to tell them apart by.

    Raises:
        ConfigurationError: the host is not loopback, and no key is valid.
    """
    now = datetime.now(UTC)
    if not settings.is_loopback and not any(key.is_valid(now) for key in keys):
        raise ConfigurationError(
            f"setting serve.host: {settings.host} can be reached from other machines, and there is no valid API key; "
            "make one first (hotswap keys create NAME), or listen on 127.0.0.1",
            param="host",
        )


def check_port(settings: ServeSettings) -> None:
    """Look whether the server could listen where it is to, before it loads a base model to find out.

    Raises:
        ConfigurationError: another program listens there, or the address can't be had.
    """
    with socket.socket(socket.AF_INET6 if settings.host == "::" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a closed connection is no one
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigurationError(
                    f"setting serve.host: can't listen on {settings.host}:{settings.port}: {error.strerror}",
                    param="host",
                ) from None
            raise ConfigurationError(
                f"setting serve.port: another program listens on {settings.host}:{settings.port}; stop it, or give "
                "another port (--port NUMBER)",
                param="port",
            ) from None
