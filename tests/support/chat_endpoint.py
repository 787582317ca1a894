"""A foreign endpoint that answers chats by a function: what a judge model or another server would be."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["ChatEndpoint", "chat_endpoint"]


class ChatEndpoint(ThreadingHTTPServer):
    """Answers every POST as a chat, and keeps bodies and Authorization headers."""

    def __init__(self, answer: Callable[[dict[str, Any]], str | None]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        """Where it listens, without `/v1`."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        """Called for each request."""
        assert isinstance(self.server, ChatEndpoint)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("authorization"))
        text = self.server.answer(body)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        answer = {"id": "chatcmpl-1", "choices": [choice], "usage": {"completion_tokens": 1}}
        if text is None:
            answer = {"error": {"message": "no such form", "type": "invalid_request_error"}}
        self.send_response(400 if text is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def chat_endpoint(answer: Callable[[dict[str, Any]], str | None]) -> Iterator[ChatEndpoint]:
    """An endpoint on a free port for the block; `answer` makes the text from a request's body, None a 400."""
    server = ChatEndpoint(answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
