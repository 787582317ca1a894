"""The names by which a source calls its speakers, and which role of a conversation each of them has.

Knows lists of messages wherever a row holds them; what a column means is for `training/recognise.py` to say.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters.errors import DataError

__all__ = ["ROLES", "name_unknown_roles", "parse_roles", "rename_speakers"]

# What a speaker's name can be mapped to, with `--roles name=role`.
ROLES = ("system", "user", "assistant", "tool")
_MAX_DEPTH = 4
_MAX_NAMES_SHOWN = 10


def parse_roles(texts: Sequence[str]) -> dict[str, str]:
    """`name=role` pairs, several in one text with commas between them. Names are told apart without case and edges.

    Raises:
        DataError: a text is none, or names a role that there is not, or one speaker twice.
    """
    roles: dict[str, str] = {}
    for pair in (pair for text in texts for pair in text.split(",")):
        name, _, role = pair.rpartition("=")
        if not _key(name) or role not in ROLES:
            raise DataError([f"roles {pair!r:.80}: expected NAME=ROLE with a role of {', '.join(ROLES)}"])
        if _key(name) in roles:
            raise DataError([f"roles {pair!r:.80}: {name.strip()} is given twice"])
        roles[_key(name)] = role
    return roles


def rename_speakers(document: Any, roles: Mapping[str, str]) -> Any:
    """A row with the roles instead of the names, in every list of messages that it holds; the row itself is left be."""
    if not isinstance(document, Mapping):
        return document
    return {key: _rename_value(value, roles, depth=1) for key, value in document.items()}


def name_unknown_roles(rows: Iterable[Sequence[str]]) -> str:
    """One sentence on all the names that are no roles, by how many rows have them; `rows` are the names of each row."""
    counts = Counter(name for names in rows for name in dict.fromkeys(names))
    ranked = [name for name, _ in counts.most_common(_MAX_NAMES_SHOWN)]
    found = ", ".join(f"{name!r:.60} ({counts[name]} {'row' if counts[name] == 1 else 'rows'})" for name in ranked)
    more = f" and {len(counts) - len(ranked)} more" if len(counts) > len(ranked) else ""
    given = {_key(name): name for name in reversed(ranked)}  # --roles tells names apart without case and edges
    option = shlex.quote(",".join(f"{name:.60}=ROLE" for name in reversed(given.values()) if "," not in name))
    expected = f"say which of {', '.join(ROLES)} each of them is"
    comma = "; a name with a comma can't be given, rename that speaker" if any("," in name for name in ranked) else ""
    advice = f": --roles {option}" if option != "''" else ""
    return f"roles that are not known: {found}{more}; {expected}{advice}{comma}"


def _rename_value(value: Any, roles: Mapping[str, str], depth: int) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV that holds a list
        return _rename_text(value, roles)
    if isinstance(value, list):
        return [_rename_message(item, roles) for item in value]
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        return {key: _rename_value(inner, roles, depth + 1) for key, inner in value.items()}
    return value


def _rename_text(text: str, roles: Mapping[str, str]) -> Any:
    """The list that a text is; other text that begins with a bracket is left as it is."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        return text
    is_messages = isinstance(messages, list) and any(
        isinstance(item, Mapping) and not {"role", "from"}.isdisjoint(item) for item in messages
    )
    return [_rename_message(item, roles) for item in messages] if is_messages else text


def _rename_message(message: Any, roles: Mapping[str, str]) -> Any:
    if not isinstance(message, Mapping):
        return message
    named = {key: roles.get(_key(message[key])) for key in ("from", "role") if isinstance(message.get(key), str)}
    return {**message, **{key: role for key, role in named.items() if role is not None}}


def _key(name: str) -> str:
    return name.strip().lower()
