"""Built-in rules that score an answer by itself or by a reference answer; prompts to compare versions on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapters.chat_rows import ChatRow, LabelledRow, PreferenceRow, row_document
from adapters.errors import ConfigurationError, DataError
from training.answer_format import keeps_format
from training.formats import Dataset, NumberedRow

__all__ = ["RULES", "ComparisonPrompt", "comparison_prompts", "score_answer"]

RULES = ("exact", "length", "format")


@dataclass(frozen=True, slots=True)
class ComparisonPrompt:
    """A conversation up to where the assistant is to speak, in the wire's form; None where there is no good answer."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    reference: str | None


def comparison_prompts(dataset: Dataset) -> list[ComparisonPrompt]:
    """The prompt of each row, and its good answer: the last one of a conversation, the chosen one, one labelled good.

    Raises:
        DataError: the rows are plain text, which asks nothing.
    """
    if dataset.kind == "text":
        raise DataError([f"{dataset.name}: holds text rows, which ask nothing; expected conversations or prompts"])
    return [_to_prompt(numbered) for numbered in dataset.rows]


def score_answer(
    rule: str, answer: str, prompt: ComparisonPrompt, *, expression: str | None, schema: str | None
) -> float | None:
    """A number by one of `RULES`; None where the prompt has no reference answer that the rule would need.

    `exact`: 1 for the reference answer, white space at its ends aside, otherwise 0. `length`: the answer's characters.
    `format`: 1 for an answer in the form of the regular expression and the JSON schema, otherwise 0.

    Raises:
        ConfigurationError: the rule is `format`, and there is no form.
    """
    if rule == "length":
        return float(len(answer))
    if rule == "format":
        if expression is None and schema is None:
            raise ConfigurationError("rule format: expected a regular expression or a JSON schema, found neither")
        return float(keeps_format(answer, expression=expression, schema=schema))
    return None if prompt.reference is None else float(answer.strip() == prompt.reference.strip())


def _to_prompt(numbered: NumberedRow) -> ComparisonPrompt:
    row, document = numbered.row, row_document(numbered.row)
    tools = tuple(document.get("tools", ()))
    if isinstance(row, ChatRow):
        *messages, last = document["messages"]
        return ComparisonPrompt(_unweighted(messages), tools, _text(last))
    messages = document["prompt"]
    good: dict[str, Any] | None = None
    if isinstance(row, PreferenceRow):
        (good,) = document["chosen"]
    elif isinstance(row, LabelledRow) and row.label:
        (good,) = document["completion"]
    return ComparisonPrompt(_unweighted(messages), tools, None if good is None else _text(good))


def _unweighted(messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """What training weighs is nothing to the model that answers."""
    return tuple({key: value for key, value in message.items() if key != "weight"} for message in messages)


def _text(message: dict[str, Any]) -> str | None:
    """An answer's text; None for one that is calls alone, to which no text can be compared."""
    return message["content"] or None
