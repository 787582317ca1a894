"""The settings of the server: `[serve]` in hotswap.toml, `HOTSWAP_SERVE_*`, or flags of `hotswap serve`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from adapters.settings import SettingsSection

__all__ = ["ServeSettings"]


class ServeSettings(SettingsSection):
    """Where to listen, and how much to take on."""

    model_config = SettingsConfigDict(env_prefix="HOTSWAP_SERVE_", extra="forbid", frozen=True)
    table: ClassVar[str | None] = "serve"

    host: Literal["127.0.0.1", "0.0.0.0", "::"] = Field(  # noqa: S104 - the user's choice, loopback by default
        "127.0.0.1",
        description="Address to listen on. There are no API keys yet: anything but loopback is open to all.",
    )
    port: int = Field(8000, ge=1024, le=65535, description="Port to listen on.")
    slots: int = Field(8, ge=1, le=256, description="Adapters on the device at once, besides the base model.")
    max_batch: int = Field(32, ge=1, le=512, description="Requests computed at once.")
    max_context: int = Field(2048, ge=64, le=131_072, description="Prompt and answer together, in tokens.")
    max_tokens: int = Field(512, ge=1, le=131_072, description="Answer's length where a request gives none.")
    max_prefill_tokens: int = Field(256, ge=16, le=65_536, description="Prompt tokens computed beside one decode step.")
    max_waiting: int = Field(256, ge=1, le=100_000, description="Requests in flight before new ones get 429.")
    max_body_bytes: int = Field(2_000_000, ge=1000, le=1_000_000_000, description="Largest request body.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_tokens >= self.max_context:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be less than max_context ({self.max_context})")
        return self
