"""Finds out which shape a table of training data has, or is told so by a mapping, and makes rows of it.

A shape is a set of columns that people and public data sets use, and what each of them means. Where several fit, nobody
guesses: the error names them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapters.chat_messages import RowProblem
from adapters.chat_rows import Row, parse_document
from adapters.errors import DataError
from training.shape_advice import find_speaker, list_columns, suggest_mapping, topic_advice, turn_advice
from training.turns import TurnJoiner

__all__ = ["SHAPES", "TARGETS", "Shape", "choose_shape", "parse_mapping", "spread"]

# What a column can be mapped to, with `--map target=column`.
TARGETS = (
    "messages",
    "user",
    "assistant",
    "system",
    "input",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "text",
    "tools",
)
# A column that half of the rows lack is no sign of a shape.
_MIN_SHARE = 0.5
_MAX_DEPTH = 4
_TOPIC_COLUMNS = ("label", "topic", "category", "class", "intent")
_SHARE_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CHAT_KEYS = ("tools", "functions", "parallel_tool_calls")
_EXTRAS = {"system": "system", "tools": "tools"}
_TRUE = frozenset({"true", "1", "yes", "good", "desirable"})
_FALSE = frozenset({"false", "0", "no", "bad", "undesirable"})
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class _Made:
    """A row in its canonical form, and which column each of its messages came from.

    Args:
        document: For `parse_document`.
        paths: One a message of `messages`: where it stands in the source.
        text_key: What the source calls a message's content; empty where the column itself is the content.
        role_key: What it calls a message's role.
    """

    document: Any
    paths: Sequence[str] = ()
    text_key: str = ""
    role_key: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape and its columns: `columns` says which column each target is."""

    title: str
    columns: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[Mapping[str, Any], Mapping[str, str]], _Made] = lambda row, columns: _Made(row)
    beside: frozenset[str] = frozenset()

    @property
    def covered(self) -> frozenset[str]:
        """The columns that this shape accounts for; another shape that needs only some of them is no rival."""
        return frozenset({*self.columns.values(), *self.optional.values(), *self.beside})

    def fits(self, columns: Sequence[str]) -> bool:
        """Whether a table with these columns can be read so."""
        return set(self.columns.values()) <= set(columns)

    def read(self, document: Any, turns: TurnJoiner | None = None) -> tuple[Row | None, list[RowProblem]]:
        """The row of one document; or None and what is wrong with it, in the names of the source.

        With `turns` its conversation is mended first.
        """
        if not isinstance(document, Mapping):
            return parse_document(document)
        try:
            made = self.make(document, {**self.optional, **self.columns})
        except _UnfitError as error:
            return None, [error.problem]
        if turns is not None:
            made = _mend_turns(made, turns)
        row, problems = parse_document(made.document)
        return row, [_in_source_names(problem, made, self.columns) for problem in problems]

    def used(self, columns: Sequence[str]) -> dict[str, str]:
        """Which column is which target in a table with these columns."""
        return {**self.columns, **{target: name for target, name in self.optional.items() if name in columns}}

    def describe(self, columns: Sequence[str]) -> str:
        """What was recognised, by which columns, and which columns are left aside."""
        used = self.used(columns)
        pairs = ", ".join(f"{target} = {name}" for target, name in used.items())
        ignored = [name for name in columns if name not in used.values()]
        rest = f"; ignored: {list_columns(ignored)}" if ignored else ""
        return f"{self.title} ({pairs}{rest})"


class _UnfitError(Exception):
    """A row that can't be brought into its canonical form."""

    def __init__(self, field_path: str, text: str) -> None:
        self.problem = RowProblem(field_path, text)


def parse_mapping(texts: Sequence[str]) -> dict[str, str]:
    """`target=column` pairs, several in one text with commas between them.

    Raises:
        DataError: a text is none, or names a target that there is not, or one twice.
    """
    mapping: dict[str, str] = {}
    for pair in (pair for text in texts for pair in text.split(",")):
        target, found, column = pair.partition("=")
        if not found or not column or target not in TARGETS:
            raise DataError([f"map {pair!r:.80}: expected TARGET=COLUMN with a target of {', '.join(TARGETS)}"])
        if target in mapping:
            raise DataError([f"map {pair!r:.80}: {target} is given twice"])
        mapping[target] = column
    return mapping


def spread(document: Any) -> Any:
    """An object with the values of objects in it as columns of their own beside them: `reply.text`."""
    if not isinstance(document, Mapping):
        return document
    inner = {f"{key}.{path}": leaf for key, value in document.items() for path, leaf in _leaves(value)}
    return {**inner, **document}


def _leaves(value: Any, depth: int = 1) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth <= _MAX_DEPTH:
        for key, inner in value.items():
            yield str(key), inner
            yield from ((f"{key}.{path}", leaf) for path, leaf in _leaves(inner, depth + 1))


def choose_shape(documents: Sequence[Any], mapping: Mapping[str, str] | None, name: str) -> tuple[Shape, list[str]]:
    """The shape of these rows and the columns that they have.

    Raises:
        DataError: no shape fits, or several do, or the mapping names what is not there; says what to give.
    """
    columns = _columns_of(documents)
    if mapping:
        return _mapped_shape(mapping, columns, name), columns
    frequent = _frequent_columns(documents)
    candidates = [shape for shape in SHAPES if shape.fits(frequent)]
    kept = [shape for shape in candidates if not any(_outdoes(other, shape) for other in candidates)]
    if len(kept) == 1 and "text" in kept[0].columns and (speaker := find_speaker(frequent)):
        raise DataError([turn_advice(name, speaker)])
    topic = next((column for column in _TOPIC_COLUMNS if column in frequent), None)
    if len(kept) == 1 and "text" in kept[0].columns and topic:
        raise DataError([topic_advice(name, kept[0].columns["text"], topic, columns)])
    if len(kept) == 1:
        return kept[0], columns
    if not kept:
        plain = [spread(row) for row in documents]
        leaves = [key for key in _columns_of(plain) if not any(isinstance(row.get(key), Mapping) for row in plain)]
        raise DataError([suggest_mapping(name, leaves, plain)])
    ways = "; ".join(f"{shape.title}: --map {_as_map(shape, columns)}" for shape in kept)
    raise DataError([f"{name}: the columns {list_columns(columns)} could be read in several ways; say which: {ways}"])


def _columns_of(documents: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(key for row in documents if isinstance(row, Mapping) for key in row))


def _frequent_columns(documents: Sequence[Any]) -> list[str]:
    rows = [row for row in documents if isinstance(row, Mapping)]
    counts = Counter(key for row in rows for key, value in row.items() if value is not None)
    return [key for key, count in counts.items() if count >= _MIN_SHARE * len(rows)]


def _outdoes(other: Shape, shape: Shape) -> bool:
    """Whether `other` accounts for all that `shape` needs, and for more; of two that need the same, the first."""
    needs, covered = set(shape.columns.values()), other.covered
    if other is shape or not needs <= covered:
        return False
    return not set(other.columns.values()) <= shape.covered or SHAPES.index(other) < SHAPES.index(shape)


def _mapped_shape(mapping: Mapping[str, str], columns: Sequence[str], name: str) -> Shape:
    if missing := [column for column in mapping.values() if column not in columns]:
        raise DataError([f"{name}: has no column {missing[0]!r:.60}; its columns are {list_columns(columns)}"])
    for title, targets, optional, make in _MAPPED:
        given = set(mapping)
        if set(targets) <= given <= {*targets, *optional}:
            return Shape(f"mapped to {title}", dict(mapping), make=make)
    expected = "; ".join(f"{', '.join(targets)} ({title})" for title, targets, _, _ in _MAPPED)
    made = f"{name}: no row is made of {', '.join(mapping)} alone"
    raise DataError([f"{made}; {_label_advice(mapping)}map one of these sets: {expected}"])


def _label_advice(mapping: Mapping[str, str]) -> str:
    """For whoever wants a text to be answered with its label, which is no target of its own."""
    asked = next((mapping[target] for target in ("text", "user", "prompt", "input") if target in mapping), None)
    if asked is None or "label" not in mapping:
        return ""
    return f"to answer a text with its label, --map user={asked},assistant={mapping['label']}; or "


def _as_map(shape: Shape, columns: Sequence[str]) -> str:
    """What to give for a shape to be read as it is recognised, with all of its columns that are there."""
    return ",".join(f"{target}={column}" for target, column in shape.used(columns).items())


def _mend_turns(made: _Made, turns: TurnJoiner) -> _Made:
    """The same with turns in order: those of a conversation, or of the prompt that answers belong to."""
    document = made.document
    if isinstance(messages := document.get("messages"), list):
        mended = turns.mend(messages, is_prompt=False)
        paths = [made.paths[first] for first, _ in mended] if made.paths else ()
        return replace(made, document={**document, "messages": [message for _, message in mended]}, paths=paths)
    if isinstance(prompt := document.get("prompt"), list):
        return replace(made, document={**document, "prompt": _mend_prompt(prompt, turns)})
    if isinstance(asked := document.get("input"), Mapping) and isinstance(asked.get("messages"), list):
        mended_input = {**asked, "messages": _mend_prompt(asked["messages"], turns)}
        return replace(made, document={**document, "input": mended_input})
    return made


def _mend_prompt(messages: list[Any], turns: TurnJoiner) -> list[Any]:
    return [message for _, message in turns.mend(messages, is_prompt=True)]


def _in_source_names(problem: RowProblem, made: _Made, columns: Mapping[str, str]) -> RowProblem:
    """The same problem with the field as the source calls it."""
    match = re.match(r"messages(?:\[(\d+)\])?(.*)", problem.field)
    if match and made.paths:
        if match[1] is None:
            return replace(problem, field=columns.get("messages", ", ".join(made.paths)))
        keys = {".content": f".{made.text_key}" if made.text_key else "", ".role": f".{made.role_key}"}
        return replace(problem, field=made.paths[int(match[1])] + keys.get(match[2], match[2]))
    root = re.match(r"[a-z_]+", problem.field)
    if root and columns.get(root[0], root[0]) != root[0]:
        return replace(problem, field=columns[root[0]] + problem.field[root.end() :])
    return problem


def _make_pair(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Made:
    """A question and its answer in columns of their own; lists of messages are taken as they are."""
    asked, answered = (row.get(columns[target]) for target in ("user", "assistant"))
    if isinstance(asked, list) or isinstance(answered, list):
        parts = [(columns[target], _as_messages(row, columns, target)) for target in ("user", "assistant")]
        paths = [f"{column}[{index}]" for column, messages in parts for index in range(len(messages))]
        return _Made({"messages": [m for _, messages in parts for m in messages]}, paths, "content", "role")
    messages, paths = _system_message(row, columns)
    question = _as_text(asked, columns["user"])
    if isinstance(extra := row.get(columns.get("input", "")), str) and extra.strip() and isinstance(question, str):
        question = f"{question}\n\n{extra}"
    answer = _as_text(answered, columns["assistant"])
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    document = {"messages": messages} | _tools(row, columns)
    return _Made(document, [*paths, columns["user"], columns["assistant"]])


def _make_text(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Made:
    return _Made({"text": _given(row, columns["text"])})


def _make_conversation(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Made:
    """A list of messages, with `role` and `content` or with ShareGPT's `from` and `value`."""
    column = columns["messages"]
    turns = row.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _from_json(turns, column)
    if column == "messages" and not _is_share(turns) and "system" not in columns:
        # What has no messages is left as it is, to be named by what it holds.
        kept = {key: row[key] for key in _CHAT_KEYS if key in row} if turns is not None else row
        return _Made({**kept, "messages": turns, **_tools(row, columns)})
    messages, paths = _system_message(row, columns)
    if not isinstance(turns, list):
        found = "nothing" if turns is None else type(turns).__name__
        raise _UnfitError(column, f"expected a list of messages, found {found}")
    paths = [*paths, *(f"{column}[{index}]" for index in range(len(turns)))]
    keys = ("value", "from") if _is_share(turns) else ("content", "role")
    messages += list(_share_messages(turns, column)) if _is_share(turns) else turns
    return _Made({"messages": messages} | _tools(row, columns), paths, *keys)


def _make_preference(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Made:
    """A prompt and two answers, or two whole conversations that begin alike."""
    chosen, rejected = (_conversation(_given(row, columns[name]), columns[name]) for name in ("chosen", "rejected"))
    prompt = _conversation(row.get(columns.get("prompt", "")), columns.get("prompt", ""))
    if isinstance(chosen, list) and isinstance(rejected, list) and (prompt is None or _begins(chosen)):
        return _Made(_split_prefix(chosen, rejected, columns) | _tools(row, columns))
    if prompt is None:
        expected = "expected a list of messages, as there is no prompt beside it"
        raise _UnfitError(columns["chosen"], f"{expected}, found {type(chosen).__name__}")
    system, _ = _system_message(row, columns)
    if system and isinstance(prompt, str):
        prompt = [*system, {"role": "user", "content": prompt}]
    return _Made({"prompt": prompt, "chosen": chosen, "rejected": rejected} | _tools(row, columns))


def _make_labelled(row: Mapping[str, Any], columns: Mapping[str, str]) -> _Made:
    label = row.get(columns["label"])
    word = str(label).strip().lower()
    if word in _TRUE or word in _FALSE:
        label = word in _TRUE
    prompt, completion = (_conversation(_given(row, columns[name]), columns[name]) for name in ("prompt", "completion"))
    return _Made({"prompt": prompt, "completion": completion, "label": label} | _tools(row, columns))


def _system_message(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    column = columns.get("system", "")
    if not (isinstance(text := row.get(column), str) and text.strip()):
        return [], []
    return [{"role": "system", "content": text}], [column]


def _tools(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    column = columns.get("tools", "")
    tools = row.get(column)
    return {"tools": _from_json(tools, column)} if tools else {}


def _as_messages(row: Mapping[str, Any], columns: Mapping[str, str], target: str) -> list[Any]:
    value = row.get(columns[target])
    return value if isinstance(value, list) else [{"role": target, "content": _as_text(value, columns[target])}]


def _as_text(value: Any, column: str) -> Any:
    """A label or an answer that is a number is as good as its text.

    Tables keep the integers of a column with gaps as floats, and the gaps as NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise _UnfitError(column, f"expected a value, found {'NaN' if math.isnan(value) else 'infinity'}")
    return str(int(value)) if value == int(value) else str(value)


def _given(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise _UnfitError(column, "expected a value, found nothing")
    return value


def _from_json(value: Any, column: str) -> Any:
    """A cell of a CSV that holds a list holds it as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        hint = "; it looks like Python's own notation: write it with json.dumps" if value.startswith("[{'") else ""
        raise _UnfitError(column, f"expected the JSON text of a list, found {value[:40]!r}{hint}") from None


def _conversation(value: Any, column: str) -> Any:
    """Messages, if the value is a list or a transcript of `Human:` and `Assistant:`; other text is left as it is."""
    if isinstance(value, list) and _is_share(value):
        return list(_share_messages(value, column))
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        _, *parts = _HH_TURN.split(value)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            {"role": roles[who], "content": text.strip()} for who, text in zip(parts[::2], parts[1::2], strict=True)
        ]
    return value


def _begins(messages: list[Any]) -> bool:
    """Whether messages are a whole conversation, not an answer alone."""
    return len(messages) > 1 and isinstance(messages[0], Mapping) and messages[0].get("role") in ("system", "user")


def _split_prefix(chosen: list[Any], rejected: list[Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        text = f"expected the messages of {columns['chosen']} but for the last one: {len(chosen)} messages"
        raise _UnfitError(columns["rejected"], f"{text}, found others, or another number ({len(rejected)})")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _is_share(turns: Any) -> bool:
    return isinstance(turns, list) and any(isinstance(turn, Mapping) and "from" in turn for turn in turns)


def _share_messages(turns: Sequence[Any], column: str) -> Iterator[dict[str, Any]]:
    """ShareGPT's turns as messages; calls of tools get ids, since ShareGPT has none."""
    num_calls = 0
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        if not isinstance(turn, Mapping):
            raise _UnfitError(where, f"expected an object with from and value, found {type(turn).__name__}")
        # A name that is none of these is left as it is, to be refused with the other names of the row.
        role = _SHARE_ROLES.get(str(turn.get("from")).strip().lower(), turn.get("from"))
        if role == "function_call":
            num_calls += 1
            yield {
                "role": "assistant",
                "content": None,
                "tool_calls": [_share_call(turn.get("value"), where, num_calls)],
            }
            continue
        message = {"role": role, "content": turn.get("value")}
        if role == "tool":
            message["tool_call_id"] = f"call_{num_calls}"
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        yield message


def _share_call(value: Any, where: str, number: int) -> dict[str, Any]:
    call = _from_json(value, f"{where}.value")
    if not isinstance(call, Mapping) or "name" not in call:
        raise _UnfitError(f"{where}.value", 'expected {"name": ..., "arguments": {...}}, as JSON')
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"id": f"call_{number}", "type": "function", "function": function}


def _pair(title: str, user: str, assistant: str, *optional: str, beside: frozenset[str] = frozenset()) -> Shape:
    extra = {name: name for name in (*optional, "system", "tools")}
    return Shape(title, {"user": user, "assistant": assistant}, extra, _make_pair, beside)


def _preference(title: str, prompt: str) -> Shape:
    columns = {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"}
    return Shape(title, columns, _EXTRAS, _make_preference)


# Of two that need the same columns the first is taken.
SHAPES: tuple[Shape, ...] = (
    Shape("chat", {"messages": "messages"}, {"tools": "tools"}, _make_conversation, frozenset({"text"})),
    Shape("ShareGPT", {"messages": "conversations"}, _EXTRAS, _make_conversation),
    Shape("ShareGPT", {"messages": "conversation"}, _EXTRAS, _make_conversation),
    _preference("preference", "prompt"),
    _preference("preference", "question"),
    _preference("preference", "instruction"),
    Shape("preference, whole conversations", {"chosen": "chosen", "rejected": "rejected"}, make=_make_preference),
    Shape(
        "preference of the hosted APIs",
        {name: name for name in ("input", "preferred_output", "non_preferred_output")},
    ),
    Shape("labelled", {name: name for name in ("prompt", "completion", "label")}, {"tools": "tools"}, _make_labelled),
    _pair("Alpaca", "instruction", "output", "input", beside=frozenset({"text"})),  # the whole prompt, again
    _pair("instruction and response", "instruction", "response"),
    _pair("prompt and completion", "prompt", "completion"),
    _pair("prompt and response", "prompt", "response"),
    _pair("question and answer", "question", "answer"),
    _pair("question and response", "question", "response"),
    _pair("query and answer", "query", "answer"),
    _pair("query and response", "query", "response"),
    _pair("input and output", "input", "output"),
    _pair("user and assistant", "user", "assistant"),
    Shape("text", {"text": "text"}, make=_make_text),
    Shape("code", {"text": "content"}, make=_make_text),
)
# What can be made of mapped columns: the title, what is needed, what may be given beside it.
_MAPPED: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Callable[..., _Made]], ...] = (
    ("chat", ("messages",), ("system", "tools"), _make_conversation),
    ("chat", ("user", "assistant"), ("system", "tools", "input"), _make_pair),
    ("labelled", ("prompt", "completion", "label"), ("tools",), _make_labelled),
    ("preference", ("prompt", "chosen", "rejected"), ("system", "tools"), _make_preference),
    ("preference", ("chosen", "rejected"), ("tools",), _make_preference),
    ("text", ("text",), (), _make_text),
)
