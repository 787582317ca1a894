"""A small text that has nothing to do with any domain, by which forgetting is measured."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow

__all__ = ["general_loss_path", "read_general_text", "read_number", "render_general_text", "write_number"]

_PATH = Path(__file__).with_name("general_text.jsonl")
_MAX_TOKENS = 32  # of each passage: many beginnings say more than a few whole texts, in the same time


def read_general_text() -> list[str]:
    """Passages of prose, dialogue, instructions, code and sums that were written for this project."""
    return [json.loads(line)["text"] for line in _PATH.read_text(encoding="utf-8").splitlines()]


def render_general_text(tokenizer: Any) -> list[RenderedRow]:
    """The beginning of each passage as plain text, without a chat template; every token but the first carries loss."""
    tokenised = (tokenizer(text).input_ids[:_MAX_TOKENS] for text in read_general_text())
    return [RenderedRow(list(ids), [True] * len(ids)) for ids in tokenised]


def general_loss_path(home: Path, base: LoadedBase) -> Path:
    """Where a home keeps the base model's loss on the text: by all that the number depends on."""
    text = hashlib.sha256(_PATH.read_bytes()).hexdigest()
    depends_on = (
        base.reference.fingerprint,
        text,
        _MAX_TOKENS,
        base.device.type,
        torch.__version__,
        transformers_version,
    )
    return home / "measured" / f"general-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]}.json"


def read_number(path: Path) -> float | None:
    """What `write_number` has written, if it has and nobody damaged it."""
    try:
        number = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return number if isinstance(number, float) and math.isfinite(number) else None


def write_number(path: Path, number: float) -> None:
    """Keep a number, whole or not at all; where it can't be kept it is measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(number), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return
