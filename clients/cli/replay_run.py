"""Asks versions for answers and judges for verdicts, keeps both in a journal, and compares the versions by them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.cli.output import error_console

if TYPE_CHECKING:
    from adapters.comparisons import PairedComparison
    from clients.http import HotswapClient
    from clients.judge import JudgeModel, Verdict
    from training.answer_rules import ComparisonPrompt

__all__ = ["Given", "Journal", "Measure", "Replay", "Scoring", "compare_by_function", "write_private"]

_JUDGE_KEY_VARIABLE = "HOTSWAP_JUDGE_API_KEY"
_BUSY = (429, 503)
_OF_THE_PROMPT = (400, 413, 504)  # it is too long, too large or takes too long; another may be none of that
_MAX_WAITS = 60
_SAVE_MODE = 0o600  # prompts and answers are somebody's


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


class Journal:
    """What was answered and judged, one JSON object a line, written as it comes: a crash loses nothing that was.

    Raises:
        InvalidInputError: the file is another than a replay has written, or can't be read or written.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {} if fresh else _read_journal(path)
        # Written anew, so that half a line is not gone on with.
        lines = [_line(key, value) for key, value in self._known.items()]
        write_private(path, "".join(lines))

    def find(self, key: str) -> dict[str, Any] | None:
        """What was written under a key."""
        return self._known.get(key)

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Write what was found out."""
        self._known[key] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(key, value))


@dataclass(frozen=True, slots=True)
class Replay:
    """One run against one server."""

    url: str
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
            given = [answer async for answer in _in_order(jobs, self.concurrency, "answers")]
        answers = {model: given[index :: len(self.models)] for index, model in enumerate(self.models)}
        for model, found in answers.items():
            self._check_one_version(model, found)
        return answers

    async def judge_all(self, answers: dict[str, list[Given]], name: str, url: str | None, criterion: str) -> Measure:
        """What a judge model prefers of every two answers to a prompt; equal answers are a tie without asking."""
        from adapters.comparisons import compare_pair
        from clients.http import HotswapClient
        from clients.judge import JudgeModel

        key = None if url is None else os.environ.get(_JUDGE_KEY_VARIABLE, "")  # never our own server's key
        comparisons, verdicts = [], []
        async with HotswapClient((url or self.url).rstrip("/").removesuffix("/v1"), api_key=key) as client:
            model = JudgeModel(client, name, criterion, {} if url else {"store": False})
            for first, second in combinations(answers, 2):
                triples = [
                    (prompt, one.text, other.text)
                    for prompt, one, other in zip(self.prompts, answers[first], answers[second], strict=True)
                    if one.error is None and other.error is None
                ]
                jobs = [lambda item=item: self._judge(model, url, *item) for item in triples]
                found = [verdict async for verdict in _in_order(jobs, self.concurrency, "verdicts")]
                verdicts += found
                if found:
                    comparisons.append(
                        compare_pair(first, second, [(verdict.score, 1 - verdict.score) for verdict in found])
                    )
        return Measure(f"judge {name}", comparisons, _bias(verdicts))

    async def _answer(self, client: HotswapClient, model: str, prompt: ComparisonPrompt) -> Given:
        key = _key("answer", model, prompt.messages, prompt.tools, self.options)
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
        from clients.errors import ApiError

        tools = {"tools": list(prompt.tools)} if prompt.tools else {}
        try:
            answer = await _patiently(lambda: client.chat(model, prompt.messages, **self.options, **tools))
        except ApiError as error:
            if error.status not in _OF_THE_PROMPT:
                raise
            return Given("", error=str(error))
        calls = [call["function"] for call in answer.tool_calls]
        text = answer.text + (json.dumps(calls, sort_keys=True) if calls else "")
        return Given(text, answer.usage.get("completion_tokens", 0), answer.finish_reason, answer.digest)

    async def _judge(
        self, judge: JudgeModel, url: str | None, prompt: ComparisonPrompt, one: str, other: str
    ) -> Verdict:
        from clients.errors import InvalidRequestError
        from clients.judge import Verdict

        if one == other:
            return Verdict("tie", "tie")
        key = _key("verdict", url, judge.model, judge.criterion, prompt.messages, prompt.reference, one, other)
        if known := self.journal.find(key):
            return Verdict(**known)
        try:
            ask = lambda: judge.compare(prompt.messages, one, other, reference=prompt.reference)  # noqa: E731
            verdict: Verdict = await _patiently(ask)
        except InvalidRequestError:
            return Verdict("unreadable", "unreadable")
        self.journal.add(key, asdict(verdict))
        return verdict


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
    from training.rewards import load_reward_function, score_texts
    from training.rewards_file import public_reward

    function = load_reward_function(name, Path.cwd(), setting="--judge")
    shown = str(public_reward(name))
    conversations = [[dict(message) for message in prompt.messages] for prompt in prompts]
    references = [prompt.reference or "" for prompt in prompts]
    scores: dict[str, list[float | None]] = {}
    for model, given in answers.items():
        texts = [answer.text for answer in given]
        found = score_texts(function, shown, texts, conversations, references, setting="--judge")
        scores[model] = [None if answer.error else score for answer, score in zip(given, found, strict=True)]
    return Measure(f"function {shown}", compare_all(scores))


async def _in_order(jobs: Sequence[Callable[[], Awaitable[Any]]], concurrency: int, what: str) -> AsyncIterator[Any]:
    """The results in the order of the jobs, so many of which run at once; the first error cancels the rest."""
    gate = asyncio.Semaphore(concurrency)

    async def run(job: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await job()

    tasks = [asyncio.ensure_future(run(job)) for job in jobs]
    try:
        for number, task in enumerate(tasks, start=1):
            yield await task
            if number % 50 == 0:
                error_console.print(f"{number} of {len(tasks)} {what}")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The answer; while a server is busy or starting it is asked again, once a second for a minute."""
    from clients.errors import ApiError

    for _ in range(_MAX_WAITS):
        try:
            return await ask()
        except ApiError as error:
            if error.status not in _BUSY:
                raise
        await asyncio.sleep(1)
    return await ask()


def _bias(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often the place decided: of the pairs that were judged in both orders."""
    return {
        "num_pairs": len(verdicts),
        "first_place_won_both": sum(verdict.follows_place == "first" for verdict in verdicts),
        "second_place_won_both": sum(verdict.follows_place == "second" for verdict in verdicts),
        "unreadable": sum("unreadable" in (verdict.as_given, verdict.turned) for verdict in verdicts),
    }


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run has written; half a line at the end is left out."""
    from adapters.errors import InvalidInputError

    known: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return known
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} can't be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["value"]
        except (ValueError, KeyError, TypeError):
            if line.endswith("\n"):
                raise InvalidInputError(
                    f"{path}, line {number}: expected what a replay has kept, found something else; another --output "
                    "leaves that file alone"
                ) from None
    return known


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _line(key: str, value: dict[str, Any]) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all.

    Raises:
        InvalidInputError: it can't be written.
    """
    from adapters.errors import InvalidInputError

    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(_SAVE_MODE)
        temporary.replace(path)
    except OSError as error:
        raise InvalidInputError(f"{path} can't be written: {error.strerror}") from None
