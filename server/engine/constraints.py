"""Constrained answers: compiles grammars off the engine's thread, and says which tokens may come next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import structlog
from llguidance import LLMatcher, LLTokenizer

from server.engine.core import Constraint, GenerationRequest
from server.engine.grammar import LIMITS, choices_grammar, json_grammar
from server.engine.waiting import Waiting

__all__ = ["Grammar", "GrammarCompiler", "GrammarError", "Matcher"]

_log = structlog.get_logger(__name__)

# Compiled grammars that are kept. One of an honest schema takes far less than a megabyte.
_MAX_GRAMMARS = 32


class GrammarError(Exception):
    """A grammar that can't be compiled, or has become too complex to follow; the message may be shown to a client."""


class Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed_tokens(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which tokens may come next, `[vocab]`, end-of-turn tokens among them where the answer may be complete.

        Raises:
            GrammarError: the grammar is too complex at this place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._raise_if_failed()
        return np.unpackbits(bits, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        """Go on behind a token.

        Raises:
            GrammarError: it is not allowed here.
        """
        self._matcher.consume_token(token)
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(_sentence(self._matcher))


class Grammar:
    """A compiled constraint, from which any number of answers may start. Copies share what has been computed."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> Matcher:
        """A matcher at the beginning; takes microseconds."""
        return Matcher(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles constraints in one thread, so that the engine's never waits, and keeps the latest.

    The vocabulary is prepared at once, since that holds the interpreter lock (0.5 s with 49,152 tokens), and should not
    happen under running answers. Compiling a schema does not; it takes milliseconds, or at most what the API process
    grants to the check of one.

    Args:
        tokenizer: A fast tokenizer of transformers.
        end_tokens: The tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, end_tokens: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = sorted(end_tokens)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-compiler")
        self._vocabulary = self._thread.submit(self._read_vocabulary)
        self._known: OrderedDict[Constraint, Future[Grammar]] = OrderedDict()
        self._waiting: list[Waiting] = []

    @property
    def num_waiting(self) -> int:
        """Requests whose grammar is not ready."""
        return len(self._waiting)

    def submit(self, request: GenerationRequest, *, now: float) -> None:
        """Begin to compile a request's constraint; `take_ready` gives the request back, with the grammar."""
        assert request.sampling.constraint is not None
        self._waiting.append(Waiting(request, now, self.compile(request.sampling.constraint)))

    def wants(self, digest: str) -> bool:
        """Whether any request here is for this version."""
        return any(waiting.request.digest == digest for waiting in self._waiting)

    def remove_if(self, condition: Callable[[Waiting], bool]) -> list[Waiting]:
        """Take out all requests that the condition is true of, and return them."""
        removed = [waiting for waiting in self._waiting if condition(waiting)]
        self._waiting = [waiting for waiting in self._waiting if waiting not in removed]
        return removed

    def take_ready(self) -> tuple[list[Waiting], list[tuple[Waiting, str]]]:
        """The requests that may join the queue, and those whose constraint can't be compiled, each with the reason."""
        done = self.remove_if(lambda waiting: waiting.grammar is not None and waiting.grammar.done())
        ready: list[Waiting] = []
        failures: list[tuple[Waiting, str]] = []
        for waiting in done:
            assert waiting.grammar is not None, "submit compiles"
            if (error := waiting.grammar.exception()) is None:
                ready.append(waiting)
            else:
                failures.append((waiting, _reason(waiting.request.id, error)))
        return ready, failures

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """The compiled constraint, at once if it is known."""
        future = self._known.pop(constraint, None)
        if future is None or (future.done() and future.exception() is not None):
            future = self._thread.submit(self._compile, constraint)
        self._known[constraint] = future
        if len(self._known) > _MAX_GRAMMARS:
            self._known.popitem(last=False)
        return future

    def find(self, constraint: Constraint) -> Future[Grammar] | None:
        """The constraint if it is compiled; changes nothing."""
        future = self._known.get(constraint)
        return future if future is not None and future.done() and future.exception() is None else None

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> Grammar:
        # The one thread has done that before; a tokenizer that can't be read fails every request with a constraint.
        vocabulary = self._vocabulary.result()
        matcher = LLMatcher(vocabulary, _grammar_of(constraint), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(_sentence(matcher))
        return Grammar(matcher)

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer  # imports transformers, which takes seconds

        return from_tokenizer(self._tokenizer, eos_token=self._end_tokens)


def _reason(request_id: str, error: BaseException) -> str:
    """What a client may be told; any other error's message may name internals."""
    if isinstance(error, GrammarError):
        return str(error)
    _log.error("grammar_compilation_crashed", request_id=request_id, exc_info=error)
    return "the answer's form could not be compiled"


def _grammar_of(constraint: Constraint) -> str:
    if constraint.kind == "choices":
        return choices_grammar(constraint.choices)
    if constraint.kind == "grammar":
        return constraint.grammar
    return json_grammar(constraint.schema if constraint.kind == "json_schema" else '{"type": "object"}')


def _sentence(matcher: LLMatcher) -> str:
    reason = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    return f"the answer's form can't be followed: {reason[:300]}"
