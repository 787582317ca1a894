"""The names by which a source calls its speakers, and which role of a conversation each of them has.

Knows lists of messages wherever a row holds them; what a column means is for `training/recognise.py` to say.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from adapters.errors import DataError

__all__ = ["ROLES", "name_unknown_roles", "parse_roles", "rename_speakers", "tidy_messages"]

# What a speaker's name can be mapped to, with `--roles name=role`; `none` leaves what the speaker says out.
ROLES = ("system", "user", "assistant", "tool", "none")
# What exports write beside a message that nobody is to learn. Any other key that is not known stays the error that it
# is: who leaves out a weight, a picture or a thought trains on something else than what is there.
_NOTE = re.compile(
    r"(?!.*(image|file|attach|audio|video|media|doc|tool))"
    r"((.*[ _-])?(id|ids|uuid|ts|time|timestamp|date|datetime|email|phone|avatar|channel|status|seq)"
    r"|(created|updated|sent)([ _-]?(at|on))?)",
    re.IGNORECASE,
)
# What exports call who speaks, and what is said.
_SPEAKER_KEYS = ("author", "sender", "speaker")
_WORD_KEYS = ("body", "text", "message", "content")
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

    def rename(messages: list[Any]) -> list[Any]:
        renamed = [_rename_message(message, roles) for message in messages]
        return [message for message in renamed if message is not None]

    return {key: _change_lists(value, rename, depth=1) for key, value in document.items()}


def tidy_messages(document: Any, columns: Collection[str]) -> tuple[Any, frozenset[str]]:
    """A row whose messages have `role` and `content`, without what exports write beside them, as times and ids.

    Says in words what was done. `columns` are those that hold messages; nothing else of the row is looked at.
    """
    done: set[str] = set()
    if not isinstance(document, Mapping) or document.keys().isdisjoint(columns):
        return document, frozenset()

    def tidy(messages: list[Any]) -> list[Any]:
        return [_without_notes(message, done) for message in _with_usual_keys(messages, done)]

    tidied = {key: _change_lists(value, tidy, depth=1) if key in columns else value for key, value in document.items()}
    return (tidied, frozenset(done)) if done else (document, frozenset())


def name_unknown_roles(rows: Iterable[Sequence[str]]) -> str:
    """One sentence on all the names that are no roles, by how many rows have them; `rows` are the names of each row."""
    counts = Counter(name for names in rows for name in dict.fromkeys(names))
    ranked = [name for name, _ in counts.most_common(_MAX_NAMES_SHOWN)]
    found = ", ".join(f"{name!r:.60} ({counts[name]} {'row' if counts[name] == 1 else 'rows'})" for name in ranked)
    more = f" and {len(counts) - len(ranked)} more" if len(counts) > len(ranked) else ""
    given = {_key(name): name for name in reversed(ranked)}  # --roles tells names apart without case and edges
    option = shlex.quote(",".join(f"{name:.60}=ROLE" for name in reversed(given.values()) if "," not in name))
    expected = f"say which of {', '.join(ROLES[:-1])} each of them is, or none to leave out what it says"
    comma = "; a name with a comma can't be given, rename that speaker" if any("," in name for name in ranked) else ""
    advice = f": --roles {option}" if option != "''" else ""
    return f"roles that are not known: {found}{more}; {expected}{advice}{comma}"


def _change_lists(value: Any, change: Callable[[list[Any]], list[Any]], depth: int) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV that holds a list
        messages = _read_messages(value)
        return value if messages is None else change(messages)
    if isinstance(value, list):
        return change(value)
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        return {key: _change_lists(inner, change, depth + 1) for key, inner in value.items()}
    return value


def _read_messages(text: str) -> list[Any] | None:
    """The list of messages that a text is; None for other text that begins with a bracket."""
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_messages = isinstance(messages, list) and any(
        isinstance(item, Mapping) and not {"role", "from"}.isdisjoint(item) for item in messages
    )
    return messages if is_messages else None


def _rename_message(message: Any, roles: Mapping[str, str]) -> Any:
    """The message with the role that its speaker stands for; None if it is to be left out."""
    if not isinstance(message, Mapping):
        return message
    named = {key: roles.get(_key(message[key])) for key in ("from", "role") if isinstance(message.get(key), str)}
    if "none" in named.values():
        return None
    return {**message, **{key: role for key, role in named.items() if role is not None}}


def _with_usual_keys(messages: list[Any], done: set[str]) -> list[Any]:
    """Messages whose speaker and words go by other names, if each of them has one of either, and all the same."""
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        return messages
    used = frozenset().union(*messages)
    shared = used.intersection(*messages)
    speakers, words = ([key for key in keys if key in used] for keys in (_SPEAKER_KEYS, _WORD_KEYS))
    if len(speakers) != 1 or len(words) != 1 or not shared.issuperset(speakers + words) or used & {"role", "from"}:
        return messages
    usual = {speakers[0]: "role", words[0]: "content"}
    done.add(f"{speakers[0]} and {words[0]} of messages read as role and content")
    return [{usual.get(key, key): value for key, value in message.items()} for message in messages]


def _without_notes(message: Any, done: set[str]) -> Any:
    """The message without keys that say nothing to be learned; one without a speaker or words is left as it is."""
    if not isinstance(message, Mapping) or not _is_said(message):
        return message
    notes = {key for key, value in message.items() if value is not None and _is_note(key)}
    done |= {f"{key!r:.60} of messages left out" for key in notes}
    return {key: value for key, value in message.items() if key not in notes}


def _is_said(message: Mapping[Any, Any]) -> bool:
    return any(speaker in message and words in message for speaker, words in (("role", "content"), ("from", "value")))


def _is_note(key: Any) -> bool:
    return isinstance(key, str) and _NOTE.fullmatch(key) is not None


def _key(name: str) -> str:
    return name.strip().lower()
