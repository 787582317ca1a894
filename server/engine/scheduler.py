"""The engine: queue, admission, one step at a time. Single-threaded; whoever owns it calls `step` in a loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import structlog
import torch

from server.engine.core import EngineEvent, FinishReason, GenerationRequest, Sequence
from server.engine.residency import Residency, Wait, WeightsReader
from server.engine.runner import ModelRunner, Work
from server.engine.sampling import make_generator, sample
from server.engine.text_stream import TextStream

__all__ = ["Engine"]

_log = structlog.get_logger(__name__)


class Engine:
    """Continuous batching: requests join and leave the batch between steps.

    Args:
        runner: The model; its cache's rows bound how many requests run at once.
        tokenizer: For turning tokens into text.
        read_weights: Reads and validates a version's weights by its digest, in a loader thread.
        max_prefill_tokens: Prompt tokens computed in one step beside the decodes; bounds a stream's longest gap.
    """

    def __init__(
        self, runner: ModelRunner, tokenizer: Any, read_weights: WeightsReader, *, max_prefill_tokens: int = 256
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._stop_tokens = frozenset({*runner.eos_token_ids, tokenizer.eos_token_id})
        self._max_prefill_tokens = max_prefill_tokens
        self.residency = Residency(runner.slots, read_weights)
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[Sequence] = []  # a sequence's index is its cache row

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not (self._running or self._waiting or self.residency.is_loading)

    def submit(self, request: GenerationRequest) -> list[EngineEvent]:
        """Queue a request; its events come from `step`, or from here if prompt and answer don't fit a cache row."""
        room = self._runner.cache.max_tokens
        if not request.prompt or len(request.prompt) + request.sampling.max_tokens > room:
            error = f"prompt and answer must take 1 to {room} tokens"
            return [EngineEvent(request.id, finish_reason="engine_failed", error=error)]
        self._waiting.append(request)
        return []

    def cancel(self, request_id: str) -> list[EngineEvent]:
        """Take a request out of the queue or the batch. Unknown ids are ignored: it may just have ended."""
        for request in self._waiting:
            if request.id == request_id:
                self._waiting.remove(request)
                return [EngineEvent(request_id, finish_reason="cancelled")]
        for sequence in self._running:
            if sequence.request.id == request_id:
                self._discard(sequence)
                return [_final(sequence, "cancelled")]
        return []

    def prefetch(self, digests: Iterable[str]) -> None:
        """Start loading versions that are not there, as long as free slots last."""
        for digest in digests:
            slot = self.residency.acquire(digest)
            if slot is Wait.NO_SLOT:
                return
            if not isinstance(slot, Wait):
                self.residency.release(digest)

    def step(self) -> list[EngineEvent]:
        """Admit what can run, compute one token for everybody who is ready, and return the news.

        An error of the model ends the requests of this step, an error behind it ends the one request; each gets an
        event, and the engine goes on.
        """
        events = self._fail_unloadable(self.residency.finish_loads())
        self._admit()
        work = self._plan()
        if not work:
            return events
        try:
            logits = self._runner.run(work)
            peaks, likeliest = logits.max(dim=-1)
            is_finite, tokens = peaks.isfinite().tolist(), likeliest.tolist()
        except Exception:
            # The boundary of one step: the requests in it end with an error, those in the queue are unaffected.
            _log.exception("engine_step_failed", num_requests=len(work))
            return events + [self._fail(item.sequence) for item in work]
        for item in work:
            item.sequence.num_cached += len(item.tokens)
        for index, (item, token) in enumerate(zip(work, tokens, strict=True)):
            if item.sequence.num_cached == item.sequence.num_tokens:
                events.append(self._choose(item.sequence, logits[index], token, is_finite=is_finite[index]))
        return events

    def close(self) -> None:
        """Stop the loader thread; requests that are left get no answer from here."""
        self.residency.close()

    def _admit(self) -> None:
        """Move requests from the queue into the batch, first come, first served.

        A request whose version is being loaded lets others go ahead. A request whose version finds every slot in use
        lets nobody past: otherwise a steady stream for resident versions would keep it waiting for ever.
        """
        postponed: list[GenerationRequest] = []
        while self._waiting and len(self._running) < self._runner.cache.num_rows:
            request = self._waiting.popleft()
            slot = self.residency.acquire(request.digest) if request.digest else 0
            if slot is Wait.LOADING:
                postponed.append(request)
            elif slot is Wait.NO_SLOT:
                self._waiting.appendleft(request)
                break
            else:
                self._running.append(self._start(request, int(slot)))
        self._waiting.extendleft(reversed(postponed))

    def _start(self, request: GenerationRequest, slot: int) -> Sequence:
        generator = make_generator(request.sampling, self._runner.device)
        return Sequence(request, TextStream(self._tokenizer, request.sampling.stop), generator, slot=slot)

    def _plan(self) -> list[Work]:
        work = []
        budget = self._max_prefill_tokens
        for row, sequence in enumerate(self._running):
            tokens = sequence.tokens_to_compute(budget)
            if not tokens:
                continue
            if not sequence.is_decoding:
                budget -= len(tokens)
            work.append(Work(sequence, row, tokens))
        return work

    def _choose(self, sequence: Sequence, logits: torch.Tensor, likeliest: int, *, is_finite: bool) -> EngineEvent:
        try:
            if not is_finite:
                raise FloatingPointError("the logits are not finite")
            return self._advance(sequence, sample(logits, likeliest, sequence))
        except Exception:
            # The boundary of one request: whatever its adapter or its text does, the others go on.
            _log.exception("engine_request_failed", request_id=sequence.request.id)
            return self._fail(sequence)

    def _advance(self, sequence: Sequence, token: int) -> EngineEvent:
        sequence.generated.append(token)
        if token in self._stop_tokens:
            return self._end(sequence, sequence.stream.finish(), "stop")
        text = sequence.stream.push(token)
        if sequence.stream.is_stopped:
            return self._end(sequence, text, "stop")
        if len(sequence.generated) >= sequence.request.sampling.max_tokens:
            text += sequence.stream.finish()
            return self._end(sequence, text, "stop" if sequence.stream.is_stopped else "length")
        return EngineEvent(sequence.request.id, text, len(sequence.generated))

    def _end(self, sequence: Sequence, text: str, reason: FinishReason) -> EngineEvent:
        self._remove(sequence)
        return _final(sequence, reason, text=text)

    def _fail(self, sequence: Sequence) -> EngineEvent:
        self._discard(sequence)
        return _final(sequence, "engine_failed", error="the model failed while it computed this answer")

    def _fail_unloadable(self, failures: dict[str, str]) -> list[EngineEvent]:
        failed = [request for request in self._waiting if request.digest in failures]
        for request in failed:
            self._waiting.remove(request)
        return [
            EngineEvent(request.id, finish_reason="adapter_failed", error=failures[request.digest or ""])
            for request in failed
        ]

    def _discard(self, sequence: Sequence) -> None:
        """Remove a request that did not end well, with all that it or its neighbour left in the cache."""
        row, last = self._running.index(sequence), self._running[-1]
        self._runner.cache.clear_row(row, sequence.num_tokens)
        self._remove(sequence)
        self._runner.cache.clear_row(len(self._running), last.num_tokens)

    def _remove(self, sequence: Sequence) -> None:
        row = self._running.index(sequence)
        last = self._running.pop()
        if last is not sequence:
            self._running[row] = last
            self._runner.cache.move_row(len(self._running), row, last.num_cached)
        if sequence.request.digest:
            self.residency.release(sequence.request.digest)


def _final(sequence: Sequence, reason: FinishReason, *, text: str = "", error: str | None = None) -> EngineEvent:
    return EngineEvent(sequence.request.id, text, len(sequence.generated), reason, error)
