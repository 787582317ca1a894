"""`hotswap chat`: one question, or a conversation line by line, with a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from clients.cli.options import JsonOption, UrlOption
from clients.cli.output import console, error_console, print_json

if TYPE_CHECKING:
    from clients.http import ChatAnswer

__all__ = ["chat"]


def chat(
    model: Annotated[str, typer.Argument(help="base, an alias (legal), or a version (legal@v1).")],
    message: Annotated[str | None, typer.Argument(help="What to say; without it, a conversation starts.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    user: Annotated[str | None, typer.Option(help="User key; experiments split by it.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for temperature above 0.")] = None,
    url: UrlOption = "http://127.0.0.1:8000",
    json: JsonOption = False,
) -> None:
    """Chat with an adapter over HTTP and see which version answered."""
    import asyncio

    history = [{"role": "system", "content": system}] if system else []
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "user": user}
    options = {name: value for name, value in options.items() if value is not None}
    if message is not None:
        asyncio.run(_turn(url, model, [*history, {"role": "user", "content": message}], options, as_json=json))
        return
    error_console.print("An empty line ends the conversation.")
    while line := typer.prompt("you", default="", show_default=False).strip():
        history.append({"role": "user", "content": line})
        answer = asyncio.run(_turn(url, model, history, options, as_json=json))
        history.append({"role": "assistant", "content": answer.text})


async def _turn(
    url: str, model: str, messages: list[dict[str, str]], options: dict[str, Any], *, as_json: bool
) -> ChatAnswer:
    from clients.http import ChatAnswer, HotswapClient

    answer = ChatAnswer()
    async with HotswapClient(url) as client:
        async for text in client.stream_chat(model, messages, answer, **options):
            if not as_json:
                console.print(text, end="", markup=False, soft_wrap=True)
    if as_json:
        print_json(answer)
        return answer
    console.print()
    arm = f", arm {answer.arm}" if answer.arm else ""
    tokens = answer.usage.get("completion_tokens", 0)
    error_console.print(
        f"-- {answer.version}{arm}, {tokens} tokens, finish: {answer.finish_reason}, id {answer.id}", style="dim"
    )
    return answer
