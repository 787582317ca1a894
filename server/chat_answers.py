"""Chat answers on the wire: whole, or in chunks; with tool calls where the request has tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from server.calls import Call, Choice
from server.engine.core import EngineEvent
from server.logprobs import LogprobsWriter
from server.schemas import ChatRequest, chat_choice, chat_chunk, chat_completion, usage_body
from server.tools import ToolReader, read_whole

__all__ = ["ChatWriter"]


class ChatWriter:
    """Writes one response; use it for one form only, whole or chunks.

    Args:
        call: What is answered.
        body: What the client sent.
        logprobs: Writes log-probabilities, if they were asked for.
    """

    def __init__(self, call: Call, body: ChatRequest, logprobs: LogprobsWriter) -> None:
        self._call = call
        self._body = body
        self._logprobs = logprobs if body.logprobs else None
        self._begun: set[str] = set()
        self._readers: dict[str, ToolReader] = {}
        if call.tools is not None:
            self._readers = {name: ToolReader(call.tools, f"call_{name}") for name in call.answers}

    def whole(self, events: Mapping[str, Sequence[EngineEvent]]) -> dict[str, Any]:
        """The whole answer, from each answer's events."""
        return chat_completion(
            response_id=self._call.response_id,
            created=self._call.created,
            model=self._body.model,
            choices=[self._choice(name, answer, events[name]) for name, answer in self._call.answers.items()],
            usage=usage_body(self._call.prompt_tokens, self._call.completion_tokens),
        )

    def chunks(self, event: EngineEvent) -> Iterator[dict[str, Any]]:
        """What one event of the engine brings: text, calls, the end of an answer, or nothing.

        The first chunk of each answer names the role.
        """
        name = event.request_id
        index = self._call.answers[name].index
        logprobs = None if self._logprobs is None else self._logprobs.body(event.logprobs)
        deltas = list(self._deltas(event))
        if name not in self._begun:
            self._begun.add(name)
            deltas[:1] = [
                {"role": "assistant", "content": None if name in self._readers else "", **(deltas or [{}])[0]}
            ]
        elif event.logprobs and not deltas:
            deltas = [{} if name in self._readers else {"content": ""}]
        for delta in deltas:
            yield self._chunk(index=index, delta=delta, logprobs=logprobs)
            logprobs = None  # those of the event came with its first chunk
        if event.finish_reason is not None:
            yield self._chunk(index=index, delta={}, finish_reason=self._reason(name, event.finish_reason))

    def end(self) -> Iterator[dict[str, Any]]:
        """What comes behind the last answer."""
        if self._body.wants_usage:
            usage = usage_body(self._call.prompt_tokens, self._call.completion_tokens)
            yield self._chunk(delta={}) | {"choices": [], "usage": usage}

    def _choice(self, name: str, answer: Choice, events: Sequence[EngineEvent]) -> dict[str, Any]:
        text, calls = read_whole(self._readers.get(name), "".join(event.text for event in events))
        entries = (entry for event in events for entry in event.logprobs)
        return chat_choice(
            index=answer.index,
            text=text,
            finish_reason=self._reason(name, answer.finish_reason),
            logprobs=None if self._logprobs is None else self._logprobs.body(entries),
            tool_calls=calls,
        )

    def _deltas(self, event: EngineEvent) -> Iterator[dict[str, Any]]:
        reader = self._readers.get(event.request_id)
        if reader is None:
            if event.text:
                yield {"content": event.text}
            return
        pieces = list(reader.push(event.text))
        if event.finish_reason is not None:
            pieces += reader.finish()
        first_call = reader.num_calls - sum(not isinstance(piece, str) for piece in pieces)
        for piece in pieces:
            if isinstance(piece, str):
                yield {"content": piece}
            else:
                yield {"tool_calls": [{"index": first_call, **piece}]}
                first_call += 1

    def _reason(self, name: str, reason: str | None) -> str | None:
        """An answer with calls ends in them, unless it was cut."""
        reader = self._readers.get(name)
        return "tool_calls" if reader and reader.num_calls and reason == "stop" else reason

    def _chunk(self, **fields: Any) -> dict[str, Any]:
        body = chat_chunk(
            response_id=self._call.response_id, created=self._call.created, model=self._body.model, **fields
        )
        return body | {"usage": None} if self._body.wants_usage else body
