"""One training run in a YAML file: what is trained on what, and every setting that is not the default."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adapters.errors import ConfigurationError
from adapters.settings import SettingsSection
from training.config import TrainSettings
from training.rewards_file import anchor_function

__all__ = ["RunFile", "read_run_file"]

_MAX_BYTES = 1 << 20
_READING_KEYS = ("split", "validation_split", "subset", "encoding")
_OWN_KEYS = ("alias", "data", "validation", "map", "roles", "join_turns", *_READING_KEYS)


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a file says about a run; None where it says nothing. Paths are relative to the file's folder no more.

    `mapping` is which column is what, `user=question`, `roles` who is who, `agent=assistant`; with the five below they
    say how the data is read.
    """

    alias: str | None = None
    data: Path | None = None
    validation: Path | None = None
    mapping: list[str] | None = None
    roles: list[str] | None = None
    join_turns: bool = False
    split: str | None = None
    validation_split: str | None = None
    subset: str | None = None
    encoding: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_run_file(path: Path) -> RunFile:
    """Read the YAML file of one run. The values of settings are checked later, together with flags.

    Raises:
        ConfigurationError: it can't be read, is no mapping, or has a key that is unknown or there twice; names both.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigurationError(f"{path} is larger than {_MAX_BYTES} bytes: {len(content)}")
    document = _parse(path, content)
    settings = _check_keys(path, document)
    if isinstance(settings.get("reward"), str):
        settings["reward"] = anchor_function(settings["reward"], path.parent)
    if isinstance(settings.get("sample_file"), str):
        settings["sample_file"] = str(_place(path, document, "sample_file"))
    return RunFile(
        alias=_text(path, document, "alias"),
        data=_place(path, document, "data"),
        validation=_place(path, document, "validation"),
        mapping=_pairs(path, document, "map", "columns by name (user: question)"),
        roles=_pairs(path, document, "roles", "roles by speaker (agent: assistant)"),
        join_turns=_flag(path, document, "join_turns"),
        settings=settings,
        **{key: _text(path, document, key) for key in _READING_KEYS},
    )


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # it ships no types
    """Of two equal keys YAML's loader would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping in which every key stands once."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    try:
        document = yaml.load(content, Loader=_UniqueKeys)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML that can be read: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{path}: expected keys and values (alias: legal), found {type(document).__name__}")
    return document


def _check_keys(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among the keys."""
    settings = [name for name in TrainSettings.model_fields if name not in SettingsSection.model_fields]
    known = [*_OWN_KEYS, *settings]
    for key in document:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise ConfigurationError(f"{path}: unknown key {key!r:.80}; {hint}")
    return {key: value for key, value in document.items() if key in settings}


def _text(path: Path, document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is None or isinstance(value, str):
        return value
    raise ConfigurationError(f"{path}: key {key}: expected text, found {value!r:.80}")


def _flag(path: Path, document: Mapping[str, Any], key: str) -> bool:
    value = document.get(key, False)
    if isinstance(value, bool):
        return value
    raise ConfigurationError(f"{path}: key {key}: expected true or false, found {value!r:.80}")


def _pairs(path: Path, document: Mapping[str, Any], key: str, expected: str) -> list[str] | None:
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(item, str) for pair in value.items() for item in pair):
        raise ConfigurationError(f"{path}: key {key}: expected {expected}, found {value!r:.80}")
    return [f"{name}={meaning}" for name, meaning in value.items()]


def _place(path: Path, document: Mapping[str, Any], key: str) -> Path | None:
    """A path, taken from the file's own folder if it is relative and there."""
    text = _text(path, document, key)
    if text is None:
        return None
    beside = path.parent / text
    return beside if beside.exists() else Path(text)
