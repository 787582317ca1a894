"""POST /v1/chat/completions: the answer to a conversation."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from server.auth import needs
from server.chat_answers import ChatWriter
from server.limits import TIMEOUT_HEADER, read_timeout
from server.observe import request_id_of
from server.routes.answering import respond
from server.schemas import ChatRequest
from server.services import CurrentCaller, CurrentServices
from server.units import read_experiment_headers

__all__ = ["router"]

router = APIRouter(dependencies=[needs("chat")])


@router.post("/v1/chat/completions")
async def create_chat_completion(
    body: ChatRequest, request: Request, services: CurrentServices, caller: CurrentCaller
) -> Response:
    """Answer a conversation with the version that `model` names."""
    timeout_s = read_timeout(request.headers.get(TIMEOUT_HEADER), limit_s=services.chat.timeout_s)
    request_id = request_id_of(request.scope)
    headers = read_experiment_headers(request.headers, caller)
    call = await services.chat.accept(body, request_id=request_id, caller=caller, timeout_s=timeout_s, headers=headers)
    request.state.binding = call.binding  # for the count of errors and their headers
    writer = ChatWriter(call, body, services.chat.logprobs)
    return await respond(call, services.chat.generate(call), writer, request, is_streamed=body.stream)
