"""A judge behind an OpenAI-style endpoint: it is shown two answers in both orders and says which is better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clients.http import HotswapClient

__all__ = ["JUDGE_INSTRUCTIONS", "JudgeModel", "Verdict"]

Preferred = Literal["first", "second", "tie", "unreadable"]

JUDGE_INSTRUCTIONS = (
    "You compare two answers to the same conversation. Decide which is better: {criterion}. "
    "The order of the answers and their length must not matter. Reply with 1 if answer 1 is better, with 2 if answer 2 "
    "is better, or with 0 if neither is. Reply with that digit alone."
)
_DIGIT = re.compile(r"(?<![0-9.,])([012])(?![0-9]|[.,][0-9])")
_WORDS: dict[str, Preferred] = {"0": "tie", "1": "first", "2": "second"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge preferred when one of two answers was shown first, and when the other was.

    Each is the *place* that it preferred: `first` is the answer that was shown first.
    """

    as_given: Preferred
    turned: Preferred

    @property
    def score(self) -> float:
        """1 if the one answer was preferred in both orders, 0 if the other was, 0.5 otherwise: a tie."""
        if (self.as_given, self.turned) == ("first", "second"):
            return 1.0
        return 0.0 if (self.as_given, self.turned) == ("second", "first") else 0.5

    @property
    def follows_place(self) -> Literal["first", "second"] | None:
        """The place that was preferred whichever answer stood there; None where there is no such sign of bias."""
        if self.as_given == self.turned and self.as_given in ("first", "second"):
            return self.as_given
        return None


@dataclass(frozen=True, slots=True)
class JudgeModel:
    """Asks one model, greedily.

    Args:
        client: Speaks to the endpoint.
        model: Its name there.
        criterion: What makes an answer better, in words that go on "Decide which is better: ...".
        options: Further fields of the requests.
    """

    client: HotswapClient
    model: str
    criterion: str
    options: Mapping[str, Any] = field(default_factory=dict)

    async def compare(
        self, messages: Sequence[Mapping[str, Any]], one: str, other: str, *, reference: str | None
    ) -> Verdict:
        """Ask in both orders.

        Raises:
            ApiError: the endpoint refused, failed or can't be reached.
        """
        return Verdict(
            await self._ask(messages, one, other, reference), await self._ask(messages, other, one, reference)
        )

    async def _ask(
        self, messages: Sequence[Mapping[str, Any]], first: str, second: str, reference: str | None
    ) -> Preferred:
        parts = [f"Conversation:\n{_show(messages)}"]
        if reference is not None:
            parts.append(f"A good answer, for comparison:\n{reference}")
        parts += [f"Answer 1:\n{first}", f"Answer 2:\n{second}", "Which is better? Reply with 1, 2 or 0."]
        conversation = [
            {"role": "system", "content": JUDGE_INSTRUCTIONS.format(criterion=self.criterion)},
            {"role": "user", "content": "\n\n".join(parts)},
        ]
        answer = await self.client.chat(self.model, conversation, temperature=0, **self.options)
        return _read(answer.text)


def _read(text: str) -> Preferred:
    """The verdict in an answer's last line, behind any reasoning: the only digit of 0, 1 and 2 that stands there.

    "Answer 1 is better than answer 2" is none: a guess which of them is meant would be a coin of our own.
    """
    *_, last = [line for line in (text or "").splitlines() if line.strip()] or [""]
    found = set(_DIGIT.findall(last))
    return _WORDS[found.pop()] if len(found) == 1 else "unreadable"


def _show(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {message.get('content') or '(calls)'}" for message in messages)
