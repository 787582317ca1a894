"""What other libraries' clients make of the API, as plain values.

These functions run in a process of their own: the libraries keep sockets open, configure logging and read the
environment, none of which should reach other tests.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from pydantic import BaseModel

__all__ = [
    "langchain_answer",
    "langchain_answers",
    "langchain_calls",
    "langchain_completions",
    "langchain_errors",
    "langchain_structured",
    "litellm_answer",
    "litellm_answers",
    "litellm_calls",
    "litellm_completion",
    "litellm_errors",
]

Calls = list[list[tuple[str, Any]]]


class Reply(BaseModel):
    """What structured output is asked for."""

    is_known: bool


def langchain_answers(url: str, text: str, **options: Any) -> dict[str, Any]:
    """One answer whole, in a stream, and awaited."""
    chat = _langchain(url, stream_usage=True, **options)
    whole = chat.invoke(text)
    pieces = list(chat.stream(text))
    return {
        "texts": [whole.content, "".join(piece.content for piece in pieces), asyncio.run(chat.ainvoke(text)).content],
        "totals": [
            message.usage_metadata["total_tokens"] for message in (whole, *pieces) if message.usage_metadata is not None
        ],
    }


def langchain_answer(url: str, text: str, **options: Any) -> str:
    """One answer whole."""
    return str(_langchain(url, **options).invoke(text).content)


def langchain_completions(url: str, prompts: list[str], **options: Any) -> list[str]:
    """What its class for completions makes of several prompts."""
    from langchain_openai import OpenAI

    older = OpenAI(base_url=url, api_key="none", max_retries=0, **options)
    return [generations[0].text for generations in older.generate(prompts).generations]


def langchain_structured(url: str, text: str, **options: Any) -> bool:
    """Whether an answer became an instance of a class."""
    return isinstance(_langchain(url, **options).with_structured_output(Reply).invoke(text), Reply)


def langchain_calls(url: str, text: str, tool: dict[str, Any], choice: str, **options: Any) -> Calls:
    """The calls of a whole and of a streamed answer: names and arguments."""
    bound = _langchain(url, **options).bind_tools([tool], tool_choice=choice)
    joined, *pieces = bound.stream(text)
    for piece in pieces:
        joined += piece
    return [[(call["name"], call["args"]) for call in message.tool_calls] for message in (bound.invoke(text), joined)]


def langchain_errors(url: str, text: str, cases: list[dict[str, Any]]) -> list[str]:
    """The names of the errors that requests with these options end in."""
    return [_error_of(lambda case=case: _langchain(url, **case).invoke(text)) for case in cases]


def litellm_answers(url: str, text: str, **options: Any) -> dict[str, Any]:
    """One answer whole, in a stream, and awaited."""
    litellm = _litellm()
    fields = _fields(url, text, **options)
    whole = litellm.completion(**fields)
    chunks = list(litellm.completion(**fields, stream=True, stream_options={"include_usage": True}))
    awaited = asyncio.run(litellm.acompletion(**fields))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    return {
        "texts": [whole.choices[0].message.content, streamed, awaited.choices[0].message.content],
        "totals": [whole.usage.total_tokens, chunks[-1].usage.total_tokens],
    }


def litellm_answer(url: str, text: str, **options: Any) -> str:
    """One answer whole."""
    return str(_litellm().completion(**_fields(url, text, **options)).choices[0].message.content)


def litellm_completion(url: str, prompt: str, **options: Any) -> str:
    """What its function for completions gives."""
    answer = _litellm().text_completion(api_base=url, api_key="none", prompt=prompt, max_retries=0, **options)
    return str(answer.choices[0].text)


def litellm_calls(url: str, text: str, tool: dict[str, Any], choice: Any, **options: Any) -> Calls:
    """The calls of a whole and of a streamed answer: names and arguments."""
    litellm = _litellm()
    fields = _fields(url, text, tools=[tool], tool_choice=choice, **options)
    answers = [
        litellm.completion(**fields),
        litellm.stream_chunk_builder(list(litellm.completion(**fields, stream=True))),
    ]
    return [
        [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls or ()]
        for answer in answers
    ]


def litellm_errors(url: str, cases: list[dict[str, Any]]) -> list[str]:
    """The names of the errors that requests with these fields end in."""
    litellm = _litellm()
    return [_error_of(lambda case=case: litellm.completion(**{**_fields(url, "hi"), **case})) for case in cases]


def _langchain(url: str, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(**{"base_url": url, "api_key": "none", "max_retries": 0, **options})


def _litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it fetches its price list when it is imported
    import litellm

    litellm.suppress_debug_info = True
    return litellm


def _fields(url: str, text: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"api_base": url, "api_key": "none", "messages": messages, "max_retries": 0, **options}


def _error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return ""
