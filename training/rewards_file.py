"""The name of a reward function in a file, `rewards.py:polite`; what reads settings knows it without a trainer."""

from __future__ import annotations

from pathlib import Path

__all__ = ["anchor_function", "is_function_name", "public_reward"]


def is_function_name(name: str) -> bool:
    """Whether a `reward` names a function in a file, and not a version."""
    return ".py:" in name


def anchor_function(name: str, folder: Path) -> str:
    """The same function by a whole path, where its file was given relative to a folder."""
    if not is_function_name(name):
        return name
    file_name, _, function = name.rpartition(":")
    return f"{(folder / file_name).absolute()}:{function}"


def public_reward(name: str | None) -> str | None:
    """What a manifest says: the file's name without the folders of this machine."""
    if name is None or not is_function_name(name):
        return name
    return Path(name).name
