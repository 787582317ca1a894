"""Answers of the completions endpoint on the wire: whole, or in chunks, which look the same there."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from server.calls import Call
from server.completion_schemas import CompletionRequest, completion_body, completion_choice
from server.engine.core import EngineEvent, TokenLogprob
from server.logprobs import LogprobsWriter
from server.schemas import usage_body

__all__ = ["CompletionWriter"]


class CompletionWriter:
    """Writes one response; use it for one form only, whole or chunks.

    Args:
        call: What is answered.
        body: What the client sent.
        logprobs: Writes log-probabilities, if they were asked for.
        echoes: The text before each answer, by the engine's request id.
    """

    def __init__(
        self, call: Call, body: CompletionRequest, logprobs: LogprobsWriter, echoes: Mapping[str, str]
    ) -> None:
        self._call = call
        self._body = body
        self._echoes = dict(echoes)
        self._columns = {} if body.logprobs is None else {name: _Columns(logprobs) for name in call.answers}

    def whole(self, events: Mapping[str, Sequence[EngineEvent]]) -> dict[str, Any]:
        """The whole answer, from each answer's events."""
        choices = [
            completion_choice(
                index=answer.index,
                text=self._echoes.get(name, "") + "".join(event.text for event in events[name]),
                finish_reason=answer.finish_reason,
                logprobs=self._logprobs(name, (entry for event in events[name] for entry in event.logprobs)),
            )
            for name, answer in self._call.answers.items()
        ]
        return self._body_of(choices, usage=usage_body(self._call.prompt_tokens, self._call.completion_tokens))

    def chunks(self, event: EngineEvent) -> Iterator[dict[str, Any]]:
        """What one event of the engine brings: text, the end of an answer, both in one, or nothing."""
        name = event.request_id
        text = self._echoes.pop(name, "") + event.text
        if text or event.logprobs or event.finish_reason is not None:
            choice = completion_choice(
                index=self._call.answers[name].index,
                text=text,
                finish_reason=event.finish_reason,
                logprobs=self._logprobs(name, event.logprobs),
            )
            yield self._body_of([choice], **({"usage": None} if self._body.wants_usage else {}))

    def end(self) -> Iterator[dict[str, Any]]:
        """What comes behind the last answer."""
        if self._body.wants_usage:
            yield self._body_of([], usage=usage_body(self._call.prompt_tokens, self._call.completion_tokens))

    def _logprobs(self, name: str, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        return self._columns[name].body(entries) if name in self._columns else None

    def _body_of(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return completion_body(
            response_id=self._call.response_id,
            created=self._call.created,
            model=self._body.model,
            choices=choices,
            **more,
        )


class _Columns:
    """One answer's log-probabilities in the older form, a list for each property; counts characters from its start."""

    def __init__(self, writer: LogprobsWriter) -> None:
        self._writer = writer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def body(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        found = self._writer.body(entries)["content"]
        offsets = []
        for entry in found:
            content = bytes(entry["bytes"] or ())
            if content and not _is_continuation(content[0]):
                # Whatever is pending was half a character and stays one.
                self._offset += len(self._decoder.decode(b"", final=True))
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(content))
        return {
            "tokens": [_name(entry) for entry in found],
            "token_logprobs": [entry["logprob"] for entry in found],
            "top_logprobs": [
                {_name(item): item["logprob"] for item in [*entry["top_logprobs"], entry]} for entry in found
            ],
            "text_offset": offsets,
        }


def _is_continuation(byte: int) -> bool:
    """Whether a character of UTF-8 can't begin with it."""
    return 0x80 <= byte < 0xC0


def _name(entry: Mapping[str, Any]) -> str:
    """A token as text; one that is no whole characters by its bytes, so that different tokens have different names."""
    if entry["bytes"] is None or "\ufffd" not in entry["token"]:
        return str(entry["token"])
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
