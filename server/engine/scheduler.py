"""The engine: queue, admission, one step at a time. Single-threaded; whoever owns it calls `step` in a loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import structlog
import torch

from adapters.chat_template import stop_token_ids
from server.engine.blocks import BlockPool
from server.engine.constraints import GrammarCompiler, GrammarError
from server.engine.core import (
    MAX_TIMINGS,
    EngineEvent,
    EngineTimings,
    FinishReason,
    GenerationRequest,
    Sequence,
    StepTiming,
    TokenLogprob,
    Wait,
)
from server.engine.kernels import BLOCK_TOKENS
from server.engine.pacing import PrefillPacer
from server.engine.residency import Residency, WeightsReader
from server.engine.runner import ModelRunner, Work
from server.engine.sampling import Choice, choose_tokens, make_sampler
from server.engine.text_stream import TextStream
from server.engine.token_text import TokenBytes, TokenTrail
from server.engine.waiting import Waiting, WaitingQueue

__all__ = ["MAX_SHADOWS", "Engine"]

_log = structlog.get_logger(__name__)

MAX_SHADOWS = 4  # in the batch at once; more of them would only wait for each other


class Engine:
    """Continuous batching: requests join and leave the batch between steps.

    Args:
        runner: The model; its cache's rows bound how many requests run at once.
        tokenizer: For turning tokens into text.
        read_weights: Reads and validates a version's weights by its digest, in a loader thread.
        max_prefill_tokens: Prompt tokens computed in one step.
        max_stall_s: How long a step may take while a prompt is read beside running streams, by what earlier steps took.
        max_host_bytes: Budget of the host cache behind the slots.
        clock: Seconds that never go back; deadlines and queue times are measured on it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Any,
        read_weights: WeightsReader,
        *,
        max_prefill_tokens: int = 256,
        max_stall_s: float = 0.2,
        max_host_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._stop_tokens = stop_token_ids(tokenizer, runner.eos_token_ids)
        self._token_bytes = TokenBytes(tokenizer)
        self._grammars = GrammarCompiler(tokenizer, self._stop_tokens)
        self._pacer = PrefillPacer(max_tokens=max_prefill_tokens, max_stall_s=max_stall_s)
        self.residency = Residency(runner.slots, read_weights, max_host_bytes=max_host_bytes)
        self._clock = clock
        self._waiting = WaitingQueue()
        self._step_timings: deque[StepTiming] = deque(maxlen=MAX_TIMINGS)
        self._running: list[Sequence] = []
        cache = runner.cache
        self.blocks = BlockPool(num_blocks=cache.num_blocks, block_tokens=BLOCK_TOKENS)
        self._free_rows = list(range(cache.num_rows - 1, -1, -1))
        self._longest = min(cache.max_tokens, cache.num_blocks * BLOCK_TOKENS)

    @property
    def runner(self) -> ModelRunner:
        """The model with its slots and its cache; not to be used while the engine steps."""
        return self._runner

    @property
    def num_running(self) -> int:
        """Requests in the batch, shadows not counted."""
        return len(self._running) - self.num_shadows

    @property
    def num_shadows(self) -> int:
        """Shadows in the batch, whether they are computed or wait until nobody else is."""
        return sum(sequence.request.is_shadow for sequence in self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, or in front of it while their grammar is compiled."""
        return len(self._waiting) + self._grammars.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt and max_tokens of the requests in the queue."""
        return self._waiting.num_tokens

    @property
    def num_slots(self) -> int:
        """Places for versions, the base model's not counted."""
        return self._runner.slots.num_slots

    @property
    def cache_room(self) -> tuple[int, int]:
        """Blocks of the KV cache that a request could have, and all of them."""
        return self.blocks.num_available, self.blocks.num_blocks

    @property
    def is_idle(self) -> bool:
        """Whether a step would have nothing to do."""
        return not (self._running or self.num_waiting or self.residency.is_loading)

    def submit(self, request: GenerationRequest) -> list[EngineEvent]:
        """Queue a request and have its version read; its events come from `step`.

        What is returned ends requests: this one, if prompt and answer can't ever fit the cache, or if it is a shadow
        and there is no room for it at this moment, or earlier ones whose version could not be read.
        """
        room = self._longest
        if not request.prompt or len(request.prompt) + request.sampling.max_tokens > room:
            error = f"prompt and answer must take 1 to {room} tokens"
            return [EngineEvent(request.id, finish_reason="engine_failed", error=error)]
        if request.is_shadow:
            return self._start_shadow(request)
        # A failure that is known by now belongs to those who waited for it; this request has the version read again.
        events = self._fail_unloadable(self.residency.take_failures())
        if request.digest:
            if request.digest not in self.residency.resident:
                events += self._drop_shadows()  # before it is read: into a slot that it would find without them
            self.residency.prefetch(request.digest)
        if request.sampling.constraint is None:
            self._waiting.add(Waiting(request, self._clock()))
        else:
            self._grammars.submit(request, now=self._clock())
        return events

    def cancel(self, request_id: str) -> list[EngineEvent]:
        """Take a request out of the queue or the batch. Unknown ids are ignored: it may just have ended."""
        for queue in (self._grammars, self._waiting):
            if left := queue.remove_if(lambda waiting: waiting.request.id == request_id):
                return [self._final_unstarted(waiting, "cancelled") for waiting in left]
        for sequence in self._running:
            if sequence.request.id == request_id:
                self._give_up(sequence)
                return [_final(sequence, "cancelled")]
        return []

    def prefetch(self, digests: Iterable[str]) -> None:
        """Start loading versions that are not there, as far as free slots and the host cache last."""
        for digest in digests:
            self.residency.prefetch(digest)

    def set_pinned(self, digests: tuple[str, ...]) -> list[EngineEvent]:
        """Have exactly these versions keep their slots; shadows end, so that all find the slots as without them."""
        events = self._drop_shadows()
        self.residency.set_pinned(digests)
        return events

    def unload(self, digest: str) -> list[EngineEvent]:
        """Free a version's slot once its last request has ended; shadows end at once.

        Raises:
            ConflictError: it is pinned.
        """
        self.residency.unload(digest)
        return self._drop_shadows()

    def step(self) -> list[EngineEvent]:
        """Admit what can run, compute one token for everybody who is ready, and return the news.

        An error of the model ends the requests of this step, an error behind it ends the one request; each gets an
        event, and the engine goes on.
        """
        started = time.perf_counter()
        events = self._expire(self._clock()) + self._fail_unloadable(self.residency.finish_loads())
        events += self._take_compiled() + self._make_way()
        if not (self.num_running or self.num_waiting):
            self.residency.finish_aside()
        self._admit()
        work = self._plan()
        if not work:
            return events
        num_prompt_tokens = sum(len(item.tokens) for item in work if not item.sequence.is_decoding)
        is_live = not work[0].sequence.request.is_shadow  # a step computes one or the other
        computed = self._compute(work)
        seconds = time.perf_counter() - started
        if computed is None:
            events += [self._fail(item.sequence) for item in work]
        else:
            events += computed
            if is_live:
                self._pacer.note(num_prompt_tokens=num_prompt_tokens, seconds=seconds)
        if is_live:
            self._step_timings.append(StepTiming(seconds, has_prefill=num_prompt_tokens > 0))
        return events

    def take_timings(self) -> EngineTimings:
        """What has been measured since the last call."""
        steps = tuple(self._step_timings)
        self._step_timings.clear()
        return EngineTimings(steps, self.residency.take_timings())

    def close(self) -> None:
        """Stop the threads; requests that are left get no answer from here."""
        self._grammars.close()
        self.residency.close()

    def _compute(self, work: list[Work]) -> list[EngineEvent] | None:
        """Run the model and choose tokens; None if the model failed."""
        try:
            logits = self._runner.run(work)
            peaks, likeliest = logits.max(dim=-1)
            is_finite, tokens = peaks.isfinite().tolist(), likeliest.tolist()
        except Exception:
            # The boundary of one step: the requests in it end with an error, those in the queue are unaffected.
            _log.exception("engine_step_failed", num_requests=len(work))
            return None
        return self._choose_all(self._note_computed(work), logits, tokens, is_finite)

    def _start_shadow(self, request: GenerationRequest) -> list[EngineEvent]:
        """Take a shadow into the batch if that costs nobody anything, and drop it otherwise; it never queues."""
        constraint = request.sampling.constraint
        grammar = None if constraint is None else self._grammars.find(constraint)
        reason = ""
        if self.num_waiting or self.residency.has_unplaced_pins:
            reason = "other requests wait"
        elif self.num_shadows >= MAX_SHADOWS:
            reason = "other shadows are under way"
        elif not self._free_rows or self.blocks.blocks_for(request.num_tokens) > self.blocks.num_free:
            reason = "the batch or the KV cache has no room"
        elif constraint is not None and grammar is None:
            reason = "the form of its answer is not compiled"
        slot = None
        if not reason and request.digest is not None:
            slot = self.residency.acquire_aside(request.digest, may_read=not self.num_running)
        if not reason and slot is None and request.digest is not None:
            reason = "its version is in no slot"
        if reason:
            return [EngineEvent(request.id, finish_reason="dropped", error=reason)]
        self._running.append(self._start(Waiting(request, self._clock(), grammar), slot or 0))
        return []

    def _make_way(self) -> list[EngineEvent]:
        """Drop the shadows, unless everybody who waits finds a row, blocks and a slot beside them."""
        if not self.num_shadows:
            return []
        waiting = list(self._waiting.requests)
        num_blocks = sum(self.blocks.blocks_for(request.num_tokens) for request in waiting)
        has_room = len(waiting) <= len(self._free_rows) and num_blocks <= self.blocks.num_free
        resident = self.residency.resident
        has_slots = all(request.digest is None or request.digest in resident for request in waiting)
        return [] if has_room and has_slots else self._drop_shadows()

    def _drop_shadows(self) -> list[EngineEvent]:
        shadows = [sequence for sequence in self._running if sequence.request.is_shadow]
        for sequence in shadows:
            self._give_up(sequence)
        return [_final(sequence, "dropped", error="it gave way to other requests") for sequence in shadows]

    def _admit(self) -> None:
        """Move requests from the queue into the batch, in the queue's order."""
        while admitted := self._waiting.admit_next(self._find_place):
            self._running.append(self._start(*admitted))

    def _find_place(self, request: GenerationRequest) -> int | Wait:
        # Room first: a version that is loaded for a request without room would take a slot for nothing.
        if not self._free_rows or not self.blocks.has_room(request.digest, request.prompt, request.num_tokens):
            return Wait.NO_ROOM
        return self.residency.acquire(request.digest) if request.digest else 0

    def _start(self, waiting: Waiting, slot: int) -> Sequence:
        request, params = waiting.request, waiting.request.sampling
        # A shadow shares no prefix: which of them are kept longest would hang on it.
        shared = () if request.is_shadow else request.prompt
        allocation = self.blocks.allocate(request.digest, shared, request.num_tokens)
        sequence = Sequence(
            request,
            TextStream(self._tokenizer, params.stop),
            make_sampler(params, request.prompt, self._stop_tokens, waiting.grammar),
            TokenTrail(self._token_bytes) if params.top_logprobs is not None else None,
            slot=slot,
            row=self._free_rows.pop(),
            allocation=allocation,
            num_cached=allocation.num_shared * BLOCK_TOKENS,
            deadline=waiting.deadline,
            queued_s=self._clock() - waiting.submitted_at,
        )
        self._runner.cache.assign(sequence.row, allocation.blocks)
        return sequence

    def _plan(self) -> list[Work]:
        """One token for each decoding request, and prompt chunks within the budget behind them, shorter ones first.

        Shadows are computed in steps of their own, which are as short as those beside running streams: whoever comes
        meanwhile waits for one of them.
        """
        decodes, prefills = [], []
        live = [sequence for sequence in self._running if not sequence.request.is_shadow]
        is_held_up = not live or any(sequence.is_decoding for sequence in live)
        budget = self._pacer.budget(is_anybody_decoding=is_held_up)
        for sequence in live or self._running:
            if sequence.is_decoding:
                decodes.append(Work(sequence, sequence.tokens_to_compute(1)))
            elif budget:
                tokens = sequence.tokens_to_compute(budget)
                budget -= len(tokens)
                prefills.append(Work(sequence, tokens))
        return decodes + sorted(prefills, key=lambda item: len(item.tokens))

    def _note_computed(self, work: list[Work]) -> list[Sequence]:
        """Count the tokens of a step as cached; returns the sequences whose newest token was among them, in order."""
        for item in work:
            sequence, request = item.sequence, item.sequence.request
            was_prompt = sequence.num_cached < len(request.prompt)
            sequence.num_cached += len(item.tokens)
            if was_prompt and sequence.allocation is not None and not request.is_shadow:
                self.blocks.register(sequence.allocation, request.digest, request.prompt, sequence.num_cached)
        return [item.sequence for item in work if item.sequence.num_cached == item.sequence.num_tokens]

    def _choose_all(
        self, ready: list[Sequence], logits: torch.Tensor, likeliest: list[int], is_finite: list[bool]
    ) -> list[EngineEvent]:
        """A token for every sequence that has a row of logits; those that take the likeliest cost nothing more."""
        rows = enumerate(ready)
        samplers = {row: sequence.sampler for row, sequence in rows if sequence.sampler is not None and is_finite[row]}
        choices = choose_tokens(logits, likeliest, samplers) if samplers else {}
        return [
            self._choose(sequence, choices.get(row) or Choice(likeliest[row]), is_finite=is_finite[row])
            for row, sequence in enumerate(ready)
        ]

    def _choose(self, sequence: Sequence, choice: Choice | Exception, *, is_finite: bool) -> EngineEvent:
        try:
            if not is_finite:
                raise FloatingPointError("the logits are not finite")
            if isinstance(choice, Exception):
                raise choice
            return self._advance(sequence, choice.token, choice.logprob)
        except GrammarError as error:
            self._discard(sequence)
            return _final(sequence, "constraint_failed", error=str(error))
        except Exception:
            # The boundary of one request: whatever its adapter or its text does, the others go on.
            _log.exception("engine_request_failed", request_id=sequence.request.id)
            return self._fail(sequence)

    def _advance(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> EngineEvent:
        params, stream, trail = sequence.request.sampling, sequence.stream, sequence.trail
        sequence.generated.append(token)
        if sequence.sampler is not None:
            sequence.sampler.accept(token)
        if token in self._stop_tokens and not params.ignore_eos:
            return self._end(sequence, "", "stop")
        text = stream.push(token, may_stop=len(sequence.generated) > params.min_tokens)
        if trail is not None and logprob is not None:
            trail.add(logprob)
            trail.write(stream.decoded, is_complete=stream.is_complete)
        if stream.is_stopped or (sequence.sampler is not None and sequence.sampler.is_finished):
            return self._end(sequence, text, "stop")
        if len(sequence.generated) >= params.max_tokens:
            return self._end(sequence, text, "length")
        logprobs = trail.show(len(text)) if trail is not None else ()
        queued_s = sequence.queued_s if len(sequence.generated) == 1 else None
        return EngineEvent(sequence.request.id, text, len(sequence.generated), logprobs=logprobs, queued_s=queued_s)

    def _end(self, sequence: Sequence, text: str, reason: FinishReason) -> EngineEvent:
        """End an answer with the text that came last and what was held back; a stop string may be found in that."""
        text += sequence.stream.finish()
        logprobs = _last_logprobs(sequence, text)
        self._remove(sequence)
        return _final(sequence, "stop" if sequence.stream.is_stopped else reason, text=text, logprobs=logprobs)

    def _fail(self, sequence: Sequence) -> EngineEvent:
        self._discard(sequence)
        return _final(sequence, "engine_failed", error="the model failed while it computed this answer")

    def _take_compiled(self) -> list[EngineEvent]:
        ready, failures = self._grammars.take_ready()
        for waiting in ready:
            self._waiting.add(waiting)
        return [self._final_unstarted(waiting, "constraint_failed", reason) for waiting, reason in failures]

    def _expire(self, now: float) -> list[EngineEvent]:
        """End the requests whose deadline has come, whether they wait or run."""
        late = [sequence for sequence in self._running if sequence.deadline <= now]
        for sequence in late:
            self._give_up(sequence)
        events = [_final(sequence, "deadline", error=_too_late(sequence.request)) for sequence in late]
        unstarted = self._grammars.remove_if(lambda waiting: waiting.deadline <= now) + self._waiting.expire(now)
        return events + [
            self._final_unstarted(waiting, "deadline", _too_late(waiting.request)) for waiting in unstarted
        ]

    def _fail_unloadable(self, failures: dict[str, str]) -> list[EngineEvent]:
        if not failures:
            return []
        return [
            self._final_unstarted(waiting, "adapter_failed", failures[waiting.request.digest or ""])
            for waiting in self._waiting.remove_if(lambda waiting: waiting.request.digest in failures)
        ]

    def _final_unstarted(self, waiting: Waiting, reason: FinishReason, error: str | None = None) -> EngineEvent:
        """The last event of a request that was taken out of its queue."""
        digest = waiting.request.digest
        if digest is not None and not (self._waiting.wants(digest) or self._grammars.wants(digest)):
            self.residency.give_up(digest)
        queued_s = self._clock() - waiting.submitted_at
        return EngineEvent(waiting.request.id, finish_reason=reason, error=error, queued_s=queued_s)

    def _give_up(self, sequence: Sequence) -> None:
        """Remove a request that nobody wants any more."""
        # Whoever has generated something has finite keys and values; of a prompt half read nobody knows yet.
        self._remove(sequence, is_tainted=not sequence.generated)

    def _discard(self, sequence: Sequence) -> None:
        """Remove a request that did not end well; nothing that it computed is left for anybody."""
        self._remove(sequence, is_tainted=True)

    def _remove(self, sequence: Sequence, *, is_tainted: bool = False) -> None:
        self._running.remove(sequence)
        self._free_rows.append(sequence.row)
        assert sequence.allocation is not None, "a running sequence has blocks"
        self._runner.cache.clear(self.blocks.free(sequence.allocation, is_tainted=is_tainted))
        sequence.allocation = None
        if sequence.request.digest:
            self.residency.release(sequence.slot)
        if not sequence.request.is_shadow:  # which never was in the queue
            num_unused = sequence.request.sampling.max_tokens - len(sequence.generated)
            self._waiting.settle(sequence.request, num_unused=num_unused)


def _final(
    sequence: Sequence,
    reason: FinishReason,
    *,
    text: str = "",
    error: str | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> EngineEvent:
    return EngineEvent(sequence.request.id, text, len(sequence.generated), reason, error, logprobs, sequence.queued_s)


def _too_late(request: GenerationRequest) -> str:
    return f"the answer was not finished within its {request.timeout_s:g} seconds"


def _last_logprobs(sequence: Sequence, text: str) -> tuple[TokenLogprob, ...]:
    """The log-probabilities of an answer's last text, once its stream has been finished."""
    trail = sequence.trail
    if trail is None:
        return ()
    trail.write(sequence.stream.decoded)
    return trail.show(len(text)) + trail.end()
