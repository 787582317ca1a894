"""Tools on the wire: what a client offers, which it wants called, and the calls in a conversation's history."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from server.wire import MAX_CONTENT_CHARS, FunctionName, LenientNulls, Wire

__all__ = ["MAX_TOOLS", "NamedTool", "Tool", "ToolCall", "ToolChoice"]

MAX_TOOLS = 128

CallId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class FunctionDefinition(LenientNulls):
    """A function that the model may call. `strict` changes nothing: docs/generation.md says what is followed when."""

    name: FunctionName
    description: str | None = Field(None, max_length=8192)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Wire):
    """A function by its name."""

    name: FunctionName


class NamedTool(Wire):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Wire):
    """What was called. `arguments` is the text of a JSON object."""

    name: FunctionName
    arguments: str = Field(max_length=MAX_CONTENT_CHARS)


class ToolCall(Wire):
    """One call in an assistant's message."""

    id: CallId
    type: Literal["function"]
    function: CalledFunction
