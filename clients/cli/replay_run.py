"""Asks versions for answers and keeps them in a journal, and compares the versions by rules and by what judges say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from clients.cli.judging import (
    Journal,
    Judging,
    ToJudge,
    bias_of,
    in_order,
    key_of,
    load_judge,
    patiently,
    scores_of,
)

if TYPE_CHECKING:
    from adapters.comparisons import PairedComparison
    from clients.http import HotswapClient
    from training.answer_rules import ComparisonPrompt

__all__ = ["Given", "Measure", "Replay", "Scoring", "compare_by_function"]

_OF_THE_PROMPT = (400, 413, 504)  # it is too long, too large or takes too long; another may be none of that


@dataclass(frozen=True, slots=True)
class Given:
    """One version's answer to one prompt; `error` says why there is none. `digest` is None for the base model."""

    text: str
    tokens: int = 0
    finish_reason: str | None = None
    digest: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """One way to compare: by a rule, a function or a judge."""

    name: str
    comparisons: list[PairedComparison]
    bias: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """One run against one server. `base` says which base model that has, whose answers name no digest."""

    url: str
    base: str
    models: list[str]
    prompts: list[ComparisonPrompt]
    options: dict[str, Any]
    journal: Journal
    concurrency: int

    async def answer_all(self) -> dict[str, list[Given]]:
        """Each version's answers in the order of the prompts; what an earlier run has answered is not asked again.

        Raises:
            ApiError: the server can't be reached, or refuses for another reason than the prompt.
        """
        from clients.http import HotswapClient

        async with HotswapClient(self.url) as client:
            jobs = [
                lambda model=model, prompt=prompt: self._answer(client, model, prompt)
                for prompt in self.prompts
                for model in self.models
            ]
            given = [answer async for answer in in_order(jobs, self.concurrency, "answers")]
        answers = {model: given[index :: len(self.models)] for index, model in enumerate(self.models)}
        for model, found in answers.items():
            self._check_one_version(model, found)
        return answers

    async def judge_all(self, answers: dict[str, list[Given]], judging: Judging) -> Measure:
        """What a judge model prefers of every two answers to a prompt."""
        from adapters.comparisons import compare_pair

        comparisons, verdicts = [], []
        for first, second in combinations(answers, 2):
            both = [
                ToJudge(prompt.messages, prompt.reference, one.text, other.text)
                for prompt, one, other in zip(self.prompts, answers[first], answers[second], strict=True)
                if one.error is None and other.error is None
            ]
            found = await judging.judge(both)
            verdicts += found
            if found:
                comparisons.append(compare_pair(first, second, scores_of(found)))
        return Measure(f"judge {judging.name}", comparisons, bias_of(verdicts))

    async def _answer(self, client: HotswapClient, model: str, prompt: ComparisonPrompt) -> Given:
        from adapters.records import BASE_MODEL_NAME

        name = [model, self.base] if model == BASE_MODEL_NAME else model
        key = key_of("answer", name, prompt.messages, prompt.tools, self.options)
        if known := self.journal.find(key):
            return Given(**known)
        given = await self._ask(client, model, prompt)
        if given.error is None:  # what failed may go well with another server's limits
            self.journal.add(key, asdict(given))
        return given

    def _check_one_version(self, model: str, given: Sequence[Given]) -> None:
        from adapters.errors import InvalidInputError

        digests = {str(answer.digest)[:12] for answer in given if answer.error is None}
        if len(digests) > 1:
            raise InvalidInputError(
                f"{self.journal.path} holds answers of another {model} than this server has: expected one digest, "
                f"found {', '.join(sorted(digests))}; --fresh asks for all of them again"
            )

    async def _ask(self, client: HotswapClient, model: str, prompt: ComparisonPrompt) -> Given:
        from adapters.chat_messages import answer_text
        from clients.errors import ApiError

        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        try:
            answer = await patiently(lambda: client.chat(model, prompt.messages, **self.options, **tools))
        except ApiError as error:
            if error.status not in _OF_THE_PROMPT:
                raise
            return Given("", error=str(error))
        text = answer_text({"content": answer.text, "tool_calls": answer.tool_calls})
        return Given(text, answer.usage.get("completion_tokens", 0), answer.finish_reason, answer.digest)


@dataclass(frozen=True, slots=True)
class Scoring:
    """Built-in rules, and the form that answers are held to."""

    rules: list[str]
    expression: str | None
    schema: str | None

    def check(self) -> None:
        """Refuse what can't be followed before anything is asked.

        Raises:
            InvalidInputError: an unknown rule, no valid expression or schema, or a form that is missing or that no
                rule looks at.
        """
        import re

        from adapters.errors import InvalidInputError
        from training.answer_format import check_json_schema
        from training.answer_rules import RULES

        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise InvalidInputError(f"--rule: expected one of {', '.join(RULES)}, found {unknown[0]!r}")

        if ("format" in self.rules) != (self.expression is not None or self.schema is not None):
            raise InvalidInputError("--rule format goes with --answer-pattern or --answer-schema, and they with it")
        try:
            re.compile(self.expression or "")
            if self.schema is not None:
                check_json_schema(self.schema)
        except (re.error, ValueError) as error:
            raise InvalidInputError(f"the answers' form: {error}") from None

    def measure(
        self, models: Sequence[str], prompts: Sequence[ComparisonPrompt], answers: dict[str, list[Given]]
    ) -> list[Measure]:
        """The versions compared by each rule."""
        from adapters.comparisons import compare_all
        from training.answer_rules import score_answer

        return [
            Measure(
                f"rule {rule}",
                compare_all(
                    {
                        model: [
                            None
                            if given.error
                            else score_answer(rule, given.text, prompt, expression=self.expression, schema=self.schema)
                            for prompt, given in zip(prompts, answers[model], strict=True)
                        ]
                        for model in models
                    }
                ),
            )
            for rule in self.rules
        ]


def compare_by_function(name: str, prompts: Sequence[ComparisonPrompt], answers: dict[str, list[Given]]) -> Measure:
    """The versions compared by the scores of a function of the user's; this runs its file."""
    from adapters.comparisons import compare_all

    shown, score = load_judge(name)
    conversations = [prompt.messages for prompt in prompts]
    references = [prompt.reference or "" for prompt in prompts]
    scores: dict[str, list[float | None]] = {}
    for model, given in answers.items():
        found = score([answer.text for answer in given], conversations, references)
        scores[model] = [None if answer.error else value for answer, value in zip(given, found, strict=True)]
    return Measure(f"function {shown}", compare_all(scores))
