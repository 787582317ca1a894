"""Has answers judged, by a model or by a function of the user's, and keeps what was found out in a journal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.output import console, error_console

if TYPE_CHECKING:
    from clients.errors import InvalidRequestError
    from clients.judge import JudgeModel, Verdict

__all__ = [
    "DEFAULT_CRITERION",
    "CriterionOption",
    "Journal",
    "JudgeUrlOption",
    "Judging",
    "ToJudge",
    "bias_of",
    "in_order",
    "is_function",
    "key_of",
    "load_judge",
    "patiently",
    "print_bias",
    "scores_of",
    "write_private",
]

_JUDGE_KEY_VARIABLE = "HOTSWAP_JUDGE_API_KEY"
_BUSY = (429, 503)
_MAX_WAITS = 60
_SAVE_MODE = 0o600  # prompts and answers are somebody's

JudgeUrlOption = Annotated[
    str | None,
    typer.Option("--judge-url", help="The judge model's OpenAI-style endpoint.", show_default="the server itself"),
]
CriterionOption = Annotated[str, typer.Option("--criterion", help="What makes an answer better, for a judge model.")]
DEFAULT_CRITERION = "more correct, more helpful and to the point"

Messages = Sequence[Mapping[str, Any]]


class Journal:
    """What was answered and judged, one JSON object a line, written as it comes: a crash loses nothing that was.

    Without a path it is forgotten at the end.

    Raises:
        InvalidInputError: the file is another than a replay has written, or can't be read or written.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        if not fresh:
            self._known = _read_journal(path)
        # Written anew, so that half a line is not gone on with.
        lines = [_line(key, value) for key, value in self._known.items()]
        write_private(path, "".join(lines))

    def find(self, key: str) -> dict[str, Any] | None:
        """What was written under a key."""
        return self._known.get(key)

    def add(self, key: str, value: dict[str, Any]) -> None:
        """Write what was found out.

        Raises:
            InvalidInputError: the file can't be written any more; what it has stays.
        """
        from adapters.errors import InvalidInputError

        self._known[key] = value
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(key, value))
        except OSError as error:
            raise InvalidInputError(f"{self.path} can't be written: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class ToJudge:
    """Two answers to one conversation, and a good one where there is one."""

    messages: Messages
    reference: str | None
    one: str
    other: str


@dataclass(frozen=True, slots=True)
class Judging:
    """A judge model, asked so many times at once; what is in the journal is not asked again.

    Args:
        name: The model.
        url: Its OpenAI-style endpoint; None is the server at `server_url`.
        server_url: Where our own server listens.
        criterion: What makes an answer better, in words.
        journal: Keeps the verdicts.
        concurrency: Requests at once.
    """

    name: str
    url: str | None
    server_url: str
    criterion: str
    journal: Journal
    concurrency: int

    async def judge(self, pairs: Sequence[ToJudge]) -> list[Verdict]:
        """A verdict for each pair; equal answers are a tie without asking, and so is a prompt that the judge refuses.

        Raises:
            ApiError: the endpoint can't be reached, or refuses for another reason than the prompt.
            InvalidInputError: it refuses every pair: the fault is not in the prompts, and all ties would say nothing.
        """
        from adapters.errors import InvalidInputError
        from clients.errors import InvalidRequestError
        from clients.http import HotswapClient
        from clients.judge import JudgeModel, Verdict

        key = None if self.url is None else os.environ.get(_JUDGE_KEY_VARIABLE, "")  # never our own server's key
        base_url = (self.url or self.server_url).rstrip("/").removesuffix("/v1")
        async with HotswapClient(base_url, api_key=key) as client:
            model = JudgeModel(client, self.name, self.criterion, {} if self.url else {"store": False})
            jobs = [lambda pair=pair: self._judge(model, pair) for pair in pairs]
            found = [item async for item in in_order(jobs, self.concurrency, "verdicts")]
        refusals = [item for item in found if isinstance(item, InvalidRequestError)]
        if refusals and len(refusals) == sum(pair.one != pair.other for pair in pairs):
            raise InvalidInputError(f"the judge {self.name} refused every pair; the first reason: {refusals[0]}")
        nothing = Verdict("unreadable", "unreadable")
        return [nothing if isinstance(item, InvalidRequestError) else item for item in found]

    async def _judge(self, judge: JudgeModel, pair: ToJudge) -> Verdict | InvalidRequestError:
        """A verdict, or why the judge refused to read the pair."""
        from clients.errors import InvalidRequestError
        from clients.judge import Verdict

        if pair.one == pair.other:
            return Verdict("tie", "tie")
        asked = (pair.messages, pair.reference, pair.one, pair.other)
        key = key_of("verdict", self.url, judge.model, judge.criterion, *asked)
        if known := self.journal.find(key):
            return Verdict(**known)
        try:
            ask = lambda: judge.compare(pair.messages, pair.one, pair.other, reference=pair.reference)  # noqa: E731
            verdict: Verdict = await patiently(ask)
        except InvalidRequestError as error:
            return error
        self.journal.add(key, asdict(verdict))
        return verdict


def scores_of(verdicts: Sequence[Verdict]) -> list[tuple[float, float]]:
    """For each verdict the scores of the one answer and of the other."""
    return [(verdict.score, 1 - verdict.score) for verdict in verdicts]


def bias_of(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How often the place decided: of the pairs that were judged in both orders."""
    return {
        "num_pairs": len(verdicts),
        "first_place_won_both": sum(verdict.follows_place == "first" for verdict in verdicts),
        "second_place_won_both": sum(verdict.follows_place == "second" for verdict in verdicts),
        "unreadable": sum("unreadable" in (verdict.as_given, verdict.turned) for verdict in verdicts),
    }


def print_bias(name: str, bias: Mapping[str, int]) -> None:
    """Say how often a judge went by the place."""
    console.print(
        f"{name}: {bias['num_pairs']} pairs were shown in both orders; the place won, not the answer, "
        f"in {bias['first_place_won_both']} (the first) and {bias['second_place_won_both']} (the second); in "
        f"{bias['unreadable']} a verdict could not be read",
        markup=False,
        soft_wrap=True,
    )


def is_function(judge: str) -> bool:
    """Whether a judge is `file.py:function`, and no model."""
    return ".py:" in judge


def load_judge(name: str) -> tuple[str, Callable[[Sequence[str], Sequence[Messages], Sequence[str]], list[float]]]:
    """A function of the user's, with its name for people: of answers, prompts and references it makes scores.

    Raises:
        ConfigurationError: there is no such function, or later: it fails, or gives no numbers.
    """
    from training.rewards import load_reward_function, score_texts
    from training.rewards_file import public_reward

    function, shown = load_reward_function(name, Path.cwd(), setting="--judge"), str(public_reward(name))

    def score(answers: Sequence[str], prompts: Sequence[Messages], references: Sequence[str]) -> list[float]:
        conversations = [[dict(message) for message in prompt] for prompt in prompts]
        return score_texts(function, shown, list(answers), conversations, list(references), setting="--judge")

    return shown, score


async def in_order(jobs: Sequence[Callable[[], Awaitable[Any]]], concurrency: int, what: str) -> AsyncIterator[Any]:
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


async def patiently(ask: Callable[[], Awaitable[Any]]) -> Any:
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


def _line(key: str, value: dict[str, Any]) -> str:
    return json.dumps({"key": key, "value": value}) + "\n"


def key_of(*parts: Any) -> str:
    """The name of what was asked in a journal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
