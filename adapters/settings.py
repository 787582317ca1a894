"""Where a setting comes from: flag, then environment, then `hotswap.toml` in the home folder, then default.

The precedence is written here once. Each package declares its own section by subclassing `SettingsSection`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from adapters.errors import ConfigurationError

__all__ = ["CONFIG_FILE_NAME", "CoreSettings", "SettingsSection", "resolve_home", "split_names"]

CONFIG_FILE_NAME = "hotswap.toml"
_TABLES = ("serve", "train")  # the sections of other packages; any other table is an unknown key


def resolve_home(flag: Path | None = None) -> Path:
    """Return the absolute home folder: the flag, else `HOTSWAP_HOME`, else `~/.hotswap`. Creates nothing."""
    chosen = flag or Path(os.environ.get("HOTSWAP_HOME") or "~/.hotswap")
    return chosen.expanduser().absolute()


def split_names(value: Any) -> Any:
    """Names as a tuple, each once, from a list or from text with commas or spaces between them.

    An environment variable has no lists. What is neither is given back for the section to refuse.
    """
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
        return value
    return tuple(dict.fromkeys(name for item in given for name in item.replace(",", " ").split()))


class SettingsSection(BaseSettings):
    """One table of the configuration file, and the environment variables that override it."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)
    table: ClassVar[str | None] = None
    home: Path = Field(description="The home folder: base models, store, database and configuration file.")

    @classmethod
    def load(cls, home: Path, **flags: Any) -> Self:
        """Resolve the section; a flag that is None counts as not given.

        Raises:
            ConfigurationError: an unknown key, a value out of bounds or a file that is not TOML; names the key.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(home=home, **given)
        except ValidationError as error:
            raise ConfigurationError(_describe(error, cls.table)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flag, environment, file."""
        home = Path(init_settings()["home"])
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_table(home, cls.table))


class CoreSettings(SettingsSection):
    """What every command needs: the base model and the device. Top level of `hotswap.toml`."""

    model_config = SettingsConfigDict(env_prefix="HOTSWAP_", extra="forbid", frozen=True)
    base: str = Field("smollm2-135m", description="Embedded base model's name, a local folder, or a hub id.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto (CUDA if present), cpu, cuda or cuda:N."
    )
    quantisation: Literal["nf4", "none"] = Field(
        "nf4", description="nf4 (4 bits, double quantisation), or none: the weights as stored."
    )
    max_rank: int = Field(16, ge=1, le=256, description="Highest LoRA rank that is published, and that a slot holds.")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default is SQLite in the home folder.")

    @property
    def resolved_database_url(self) -> str:
        """The database's URL with the default filled in."""
        return self.database_url or f"sqlite:///{self.home / 'hotswap.db'}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which another process resolves these very settings."""
        prefix = self.model_config["env_prefix"]
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {f"{prefix}{name.upper()}": str(value) for name, value in values.items() if value is not None}


def _read_table(home: Path, table: str | None) -> dict[str, Any]:
    path = home / CONFIG_FILE_NAME
    if not path.exists():
        return {}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from None
    if table is None:
        return {key: value for key, value in document.items() if key not in _TABLES}
    section = document.get(table, {})
    if not isinstance(section, dict):
        raise ConfigurationError(f"{path}: [{table}] must be a table, found {type(section).__name__}")
    return section


def _describe(error: ValidationError, table: str | None) -> str:
    # What depends on a value that is wrong has no default: that follows from the first error.
    details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    return "; ".join(_describe_one(detail, table) for detail in details)


def _describe_one(detail: ErrorDetails, table: str | None) -> str:
    message = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"]
    if not detail["loc"]:  # several settings don't go together; the message names them
        return f"settings of {table}: {message}" if table else message
    prefix = f"{table}." if table else ""
    found = "" if detail["type"] == "extra_forbidden" else f", found {detail['input']!r}"
    return f"setting {prefix}{'.'.join(str(part) for part in detail['loc'])}: {message}{found}"
