"""What to say of a table whose shape nobody knows: which `--map` its columns suggest, by their values and names.

Only ever words: what a table means is for its owner to say.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.chat_rows import EXPECTED_ROW

__all__ = ["find_speaker", "list_columns", "suggest_mapping", "topic_advice", "turn_advice"]

_MAX_COLUMNS_SHOWN = 12
_SPEAKER_COLUMNS = ("speaker", "role", "sender")
_MAX_ROWS_LOOKED_AT = 500
_MAX_LABEL_CHARS = 40
_MAX_LABELS = 50
_MOMENT = re.compile(r"\d{1,4}[./:-]\d{1,2}([./:T -]*\d{1,4})*Z?")
_WORDS = re.compile(r"[^\W_]+")
# Words in the names of two columns that hold the better and the worse answer.
_POLARITIES = (
    ("chosen", "rejected"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("good", "bad"),
    ("better", "worse"),
    ("best", "worst"),
    ("winner", "loser"),
    ("positive", "negative"),
)
_ANSWER_WORDS = frozenset(
    {"answer", "reply", "response", "output", "completion", "solution", "antwort", "reponse", "respuesta", "risposta"}
)
_LABEL_WORDS = frozenset({"label", "topic", "category", "class", "intent", "queue", "tag", "kategorie", "thema"})


@dataclass(frozen=True, slots=True)
class _Column:
    """What the first values of a column are: texts of several words, words of a short list, numbers, or neither."""

    name: str
    is_text: bool
    is_label: bool
    is_number: bool

    @property
    def words(self) -> frozenset[str]:
        return frozenset(word.lower() for word in _WORDS.findall(self.name))


def suggest_mapping(name: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence for a table of no known shape: the mappings that its columns suggest, for answers and preferences."""
    if not columns:
        return f"{name}: no row has a column; {EXPECTED_ROW}"
    looked = [_look_at(column, rows[:_MAX_ROWS_LOOKED_AT]) for column in columns]
    if (talk := next((column for column in columns if _is_talk(rows, column)), None)) is not None:
        return (
            f"{name}: the columns {list_columns(columns)} are no shape that is known; {talk!r:.60} holds messages: "
            f"--map {shlex.quote(f'messages={talk}')}; docs/data.md has all targets"
        )
    preference = _suggest_preference(looked)
    to_prefer = f"to prefer one answer to another, --map {preference or 'prompt=COLUMN,chosen=COLUMN,rejected=COLUMN'}"
    to_answer = f"to learn an answer or a label (which is the answer then), --map {_suggest_answer(looked)}"
    ways = "; ".join([to_prefer, to_answer] if preference else [to_answer, to_prefer])
    return (
        f"{name}: the columns {list_columns(columns)} are no shape that is known; say which column is what: {ways}; "
        "docs/data.md has all targets"
    )


def find_speaker(columns: Sequence[str]) -> str | None:
    """The column that says who speaks, if there is one beside a text."""
    return next((column for column in _SPEAKER_COLUMNS if column in columns), None)


def turn_advice(name: str, speaker: str) -> str:
    """What to do with a table that has one message a row."""
    return (
        f"{name}: has a column {speaker!r} beside the text, as tables with one message a row have; expected one "
        'conversation a row: gather the messages of each in a list, {"messages": [{"role": "user", "content": "..."}, '
        '{"role": "assistant", "content": "..."}]}; if each text is to be learned by itself, give --map text=COLUMN'
    )


def topic_advice(name: str, text: str, topic: str, columns: Sequence[str]) -> str:
    """What to do with a text beside a topic, which may be there to be learned or not."""
    return (
        f"{name}: the columns {list_columns(columns)} could be texts with their topics, or plain text; say which: "
        f"--map user={text},assistant={topic} to answer a text with its {topic}, --map text={text} to learn the texts"
    )


def list_columns(columns: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(str(column)[:40] for column in columns[:_MAX_COLUMNS_SHOWN])
    return shown + (f" and {len(columns) - _MAX_COLUMNS_SHOWN} more" if len(columns) > _MAX_COLUMNS_SHOWN else "")


def _is_talk(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    """Whether a column holds lists of messages, by the first row that has one."""
    value = next((row[column] for row in rows if row.get(column)), None)
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], Mapping)
        and (not {"role", "from"}.isdisjoint(value[0]))
    )


def _look_at(name: str, rows: Sequence[Mapping[str, Any]]) -> _Column:
    values = [row[name] for row in rows if row.get(name) not in (None, "")]
    texts = [value.strip() for value in values if isinstance(value, str)]
    is_text = sum(" " in text for text in texts) * 2 > len(values)
    is_repeated = len(set(texts)) * 2 <= len(texts) and len(set(texts)) <= _MAX_LABELS
    is_short = all(len(text) <= _MAX_LABEL_CHARS for text in texts)
    is_label = bool(texts) and len(texts) == len(values) and is_repeated and is_short
    is_number = all(_is_number(text) for text in texts)
    return _Column(name, is_text and not is_label, is_label and not is_number, is_number)


def _is_number(text: str) -> bool:
    """Whether a text is a number, a date or a time."""
    if _MOMENT.fullmatch(text):
        return True
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _suggest_preference(columns: Sequence[_Column]) -> str:
    """Of two columns whose names differ in a word for better and worse."""
    for better, worse in _POLARITIES:
        chosen = next((column for column in columns if better in column.words), None)
        rejected = next((column for column in columns if worse in column.words), None)
        if chosen is None or rejected is None or chosen is rejected:
            continue
        prompt = next((column for column in columns if column.is_text and column not in (chosen, rejected)), None)
        asked = {} if prompt is None else {"prompt": prompt.name}
        return _as_option(asked | {"chosen": chosen.name, "rejected": rejected.name})
    return ""


def _suggest_answer(columns: Sequence[_Column]) -> str:
    """A text and its answer: one that is called so, else a label, else another text; COLUMN where nothing fits."""
    plain = [column for column in columns if not column.is_number]
    texts = [column for column in columns if column.is_text] or (plain if len(plain) == 2 else [])
    labels = [column for column in columns if column.is_label]
    named = [column for column in texts if column.words & _ANSWER_WORDS]
    asked = next((column for column in texts if column not in named[:1]), None)
    if asked is None:
        return f"text={shlex.quote(texts[0].name)}" if texts else "user=COLUMN,assistant=COLUMN"
    called = [column for column in labels if column.words & _LABEL_WORDS]
    answers = [*named, *called, *(column for column in texts if column is not asked), *labels]
    answered = next((column for column in answers if column is not asked), None)
    if answered is None:
        return f"user={shlex.quote(asked.name)},assistant=COLUMN"
    return _as_option({"user": asked.name, "assistant": answered.name})


def _as_option(mapping: Mapping[str, str]) -> str:
    return shlex.quote(",".join(f"{target}={column}" for target, column in mapping.items()))
