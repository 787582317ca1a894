"""Training rows from answers that were rated: good ones become chat rows, better and worse ones preference rows.

The same answer to the same prompt is one answer, however many users got it: its value is the mean of what they said.
Each row carries where it comes from under `metadata`, which all readers leave aside.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from adapters.chat_rows import parse_document, row_document
from adapters.conversations import RatedConversation
from adapters.errors import InvalidInputError

__all__ = ["FeedbackRows", "GoodValue", "choose_threshold", "edited_rows", "good_rows", "preference_rows"]

_CUT = "cut off at the token limit"
_SEVERAL = "one of several answers to a request, and nobody said which"
_NOT_GOOD = "rated, but not as good"
_REPEATED = "the same answer to the same prompt as another, whose row counts for both"
_NO_TEXT = "an edit without its text"
_NO_CHANGE = "an edit that leaves the answer as it was"
_UNPAIRED = "without another answer to the same prompt that was rated differently"


@dataclass(frozen=True, slots=True)
class GoodValue:
    """Which values are good: from `threshold` on, upwards or downwards. Without one, values only compare."""

    threshold: float | None = None
    higher_is_better: bool = True

    def is_good(self, value: float) -> bool:
        """Whether a value is good by itself."""
        if self.threshold is None:
            return False
        return value >= self.threshold if self.higher_is_better else value <= self.threshold

    def prefers(self, one: float, other: float) -> bool:
        """Whether an answer with the first value is to be preferred to one with the other."""
        if self.threshold is not None:
            return self.is_good(one) and not self.is_good(other)
        return one > other if self.higher_is_better else one < other


@dataclass(slots=True)
class FeedbackRows:
    """Rows as JSON objects, and how many ratings were left out, by the reason in words."""

    documents: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def choose_threshold(
    rated: Sequence[RatedConversation], threshold: float | None, *, higher_is_better: bool
) -> GoodValue:
    """What counts as good where rows need it: the given threshold, or `true` of a metric of trues and falses.

    Raises:
        InvalidInputError: the metric has other values, and no threshold was given.
    """
    values = {item.value for item in rated}
    if threshold is None and not values <= {0.0, 1.0}:
        raise InvalidInputError(
            f"{rated[0].metric!r} has values from {min(values):g} to {max(values):g}: say from which one on an answer "
            "is good (--threshold)",
            param="threshold",
        )
    default = 1.0 if higher_is_better else 0.0
    return GoodValue(default if threshold is None else threshold, higher_is_better)


def good_rows(rated: Iterable[RatedConversation], good: GoodValue) -> FeedbackRows:
    """A chat row for each answer with a good value. The loss falls on that answer; earlier ones were not rated."""
    rows = FeedbackRows()
    for answers in _answers_by_prompt(_usable(rated, rows)):
        for answer in answers:
            if good.is_good(answer.value):
                rows.left_out[_REPEATED] += len(answer.ratings) - 1
                _add(rows, _chat_document(answer.first, answer.message), answer.origin())
            else:
                rows.left_out[_NOT_GOOD] += len(answer.ratings)
    rows.left_out = +rows.left_out  # without the zeros
    return rows


def preference_rows(rated: Iterable[RatedConversation], good: GoodValue) -> FeedbackRows:
    """Preference rows of answers to the same prompt, the best with the worst; each answer stands in one row at most."""
    rows = FeedbackRows()
    for answers in _answers_by_prompt(_usable(rated, rows)):
        answers.sort(key=lambda answer: answer.value, reverse=good.higher_is_better)
        pairs = list(_pairs(answers, good))
        paired = [answer for pair in pairs for answer in pair]
        rows.left_out[_REPEATED] += sum(len(answer.ratings) - 1 for answer in paired)
        rows.left_out[_UNPAIRED] += sum(len(answer.ratings) for answer in answers if answer not in paired)
        for chosen, rejected in pairs:
            document = _preference_document(chosen.first, chosen.message, rejected.message)
            _add(rows, document, {"chosen": chosen.origin(), "rejected": rejected.origin()})
    rows.left_out = +rows.left_out
    return rows


def edited_rows(edits: Iterable[RatedConversation], *, as_preferences: bool) -> FeedbackRows:
    """Rows of answers that a user has written anew, in the comment of a feedback: the edit is the better answer."""
    rows = FeedbackRows()
    for item in _usable(edits, rows, may_be_cut=True):
        if not item.comment:
            rows.left_out[_NO_TEXT] += 1
            continue
        edit = {"role": "assistant", "content": item.comment}
        if item.comment.strip() == str(_message(item).get("content") or "").strip():
            rows.left_out[_NO_CHANGE] += 1
        elif as_preferences:
            _add(rows, _preference_document(item, edit, _message(item)), {**_origin([item]), "is_edit": True})
        else:
            _add(rows, _chat_document(item, edit), {**_origin([item]), "is_edit": True})
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    """One answer to one prompt, and everything that was said of it."""

    ratings: list[RatedConversation]

    @property
    def first(self) -> RatedConversation:
        return self.ratings[0]

    @property
    def message(self) -> dict[str, Any]:
        return _message(self.first)

    @property
    def value(self) -> float:
        return fmean(rating.value for rating in self.ratings)

    def origin(self) -> dict[str, Any]:
        return _origin(self.ratings)


def _usable(
    rated: Iterable[RatedConversation], rows: FeedbackRows, *, may_be_cut: bool = False
) -> Iterator[RatedConversation]:
    for item in rated:
        if len(item.conversation.answers) != 1:
            rows.left_out[_SEVERAL] += 1
        elif item.finish_reason == "length" and not may_be_cut:
            rows.left_out[_CUT] += 1
        else:
            yield item


def _answers_by_prompt(rated: Iterable[RatedConversation]) -> list[list[_Answer]]:
    """The different answers to each prompt, in the order in which they were first reported on."""
    prompts: dict[str, dict[str, _Answer]] = defaultdict(dict)
    for item in rated:
        calls = [call["function"] for call in _message(item).get("tool_calls") or ()]  # their ids are of one response
        name = json.dumps([_message(item).get("content"), calls], sort_keys=True)
        prompts[item.prompt_sha256].setdefault(name, _Answer([])).ratings.append(item)
    return [list(answers.values()) for answers in prompts.values()]


def _pairs(ranked: list[_Answer], good: GoodValue) -> Iterator[tuple[_Answer, _Answer]]:
    """The best answer with the worst one that it is preferred to, then the same with the rest."""
    left = list(ranked)
    while left:
        best = left.pop(0)
        if left and good.prefers(best.value, left[-1].value):
            yield best, left.pop()


def _add(rows: FeedbackRows, document: dict[str, Any], origin: dict[str, Any]) -> None:
    row, problems = parse_document(document)
    if row is None:
        rows.left_out[f"not fit for training: {problems[0]}"] += 1
    else:
        rows.documents.append({**row_document(row), "metadata": origin})


def _chat_document(item: RatedConversation, answer: dict[str, Any]) -> dict[str, Any]:
    history = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in item.conversation.messages
    ]
    return {"messages": [*history, answer], **_tools(item)}


def _preference_document(item: RatedConversation, chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    prompt = list(item.conversation.messages)
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected], **_tools(item)}


def _tools(item: RatedConversation) -> dict[str, Any]:
    return {"tools": list(item.conversation.tools)} if item.conversation.tools else {}


def _message(item: RatedConversation) -> dict[str, Any]:
    return item.conversation.answers[0]


def _origin(ratings: Sequence[RatedConversation]) -> dict[str, Any]:
    """Where an answer comes from: every response that gave it, and what was said of each."""
    return {
        "metric": ratings[0].metric,
        "value": fmean(rating.value for rating in ratings),
        "ratings": [
            {
                "response_id": rating.conversation.response_id,
                "version": rating.version,
                "digest": rating.digest,
                "value": rating.value,
                "reported_at": rating.reported_at.isoformat(),
            }
            for rating in ratings
        ],
    }
