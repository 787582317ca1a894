"""Has a candidate answer a copy of some requests, once these are answered, and writes down how the answers compare.

Live requests come first always: the engine computes a shadow while it has nothing else to do, and drops it otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError

from adapters.errors import DatabaseBusyError, EngineUnavailableError
from adapters.records import Binding
from adapters.shadows import Shadow, ShadowAnswer, ShadowOutcome, ShadowService
from server.calls import Call, answer_messages, message_of
from server.engine_client import EngineClient
from server.metrics import Metrics
from server.schemas import ChatRequest

__all__ = ["ShadowKeeper"]

_log = structlog.get_logger(__name__)
_CHECK_EVERY_S = 1.0
_MAX_TASKS = 8  # copies under way in this process; the engine takes fewer
_LIMIT_S = 120.0  # for one that has to wait for gaps; then the place is another's
_ENDED_WELL = ("stop", "length")
# A client that names a version, or a checkpoint, asks for that one: it is a test, and no sample of what users ask.
_NAMED = ("version", "checkpoint")


class ShadowKeeper:
    """Knows which shadows run, as of about a second ago, and answers the copies. Use it from one event loop only."""

    def __init__(self, service: ShadowService, engine: EngineClient, metrics: Metrics) -> None:
        self._service = service
        self._engine = engine
        self._metrics = metrics
        self._running: dict[str, Shadow] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def choose(self, body: ChatRequest, binding: Binding, response_id: str) -> Shadow | None:
        """The shadow that gets a copy of this request when it is answered, if any does.

        A request that declines to be kept gets none, and neither does one for several answers, or a tester's.
        """
        shadow = self._running.get(binding.alias)
        if shadow is None or body.store is False or body.n > 1 or binding.route in _NAMED or binding.forced:
            return None
        return shadow if shadow.digest != binding.digest and shadow.samples(response_id) else None

    def offer(self, call: Call) -> None:
        """Have the copy of a call answered that has ended well and is recorded; returns at once."""
        if call.shadow is None or call.finish_reason not in _ENDED_WELL:
            return
        if len(self._tasks) >= _MAX_TASKS:
            work = self._write(call, call.shadow, "dropped", "other shadows are under way")
        else:
            work = self._answer(call, call.shadow)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    async def settle(self) -> None:
        """Wait until the copies under way have ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def reconcile(self) -> None:
        """Read which shadows run."""
        running = await asyncio.to_thread(self._service.list, is_running=True)
        self._running = {shadow.alias: shadow for shadow in running}

    async def run(self) -> None:
        """Reconcile about once a second until cancelled; then end the copies under way."""
        try:
            while True:
                try:
                    await self.reconcile()
                except Exception:
                    # The boundary of the process: a server without this task would stop, and serving comes first.
                    # The next round tries again; until then the shadows count that were read last.
                    _log.exception("shadows_not_read")
                await asyncio.sleep(_CHECK_EVERY_S)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        """Let go of a copy that has ended, and say so if that was by an error: nobody waits for it."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("shadow_crashed", exc_info=error)

    async def _answer(self, call: Call, shadow: Shadow) -> None:
        live = call.generation
        name = f"{shadow.id}-{live.id}"
        request = replace(live, id=name, digest=shadow.digest, client="", timeout_s=_LIMIT_S, is_shadow=True)
        pieces: list[str] = []
        tokens, finish, error = 0, "dropped", "the engine is not there"
        with contextlib.suppress(EngineUnavailableError):
            async for event in self._engine.shadow(request):
                pieces.append(event.text)
                tokens, finish = event.completion_tokens, event.finish_reason or finish
                error = event.error or error
        outcome: ShadowOutcome = "answered" if finish in _ENDED_WELL else "failed"
        if finish in ("dropped", "deadline", "cancelled"):
            outcome = "dropped"
        reason = None if outcome == "answered" else error
        await self._write(call, shadow, outcome, reason, text="".join(pieces), tokens=tokens, finish=finish)

    async def _write(
        self,
        call: Call,
        shadow: Shadow,
        outcome: ShadowOutcome,
        reason: str | None,
        *,
        text: str = "",
        tokens: int = 0,
        finish: str | None = None,
    ) -> None:
        self._metrics.count_shadow(shadow.alias, shadow.label, outcome)
        (live,) = answer_messages(call)
        answer = ShadowAnswer(
            response_id=call.response_id,
            shadow_id=shadow.id,
            outcome=outcome,
            reason=reason,
            live_tokens=call.completion_tokens,
            live_finish=call.finish_reason or "",
            tokens=tokens,
            finish=finish,
            live=live,
            answer=message_of(text, call.tools, f"call_{shadow.id}") if outcome == "answered" else None,
        )
        try:
            await asyncio.to_thread(self._service.record, answer)
        except (SQLAlchemyError, DatabaseBusyError):
            _log.exception("shadow_not_recorded", response_id=call.response_id)
