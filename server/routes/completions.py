"""POST /v1/completions: what follows a text. And POST /v1/embeddings, which says that there are none."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from adapters.errors import NotFoundError
from server.auth import needs
from server.completion_answers import CompletionWriter
from server.completion_schemas import CompletionRequest
from server.limits import TIMEOUT_HEADER, read_timeout
from server.observe import request_id_of
from server.routes.answering import respond
from server.services import CurrentCaller, CurrentServices
from server.units import read_experiment_headers

__all__ = ["router"]

router = APIRouter(dependencies=[needs("chat")])


@router.post("/v1/completions")
async def create_completion(
    body: CompletionRequest, request: Request, services: CurrentServices, caller: CurrentCaller
) -> Response:
    """Continue one text or several with the version that `model` names."""
    timeout_s = read_timeout(request.headers.get(TIMEOUT_HEADER), limit_s=services.chat.timeout_s)
    request_id = request_id_of(request.scope)
    headers = read_experiment_headers(request.headers, caller)
    call = await services.chat.accept_completion(
        body, request_id=request_id, caller=caller, timeout_s=timeout_s, headers=headers
    )
    request.state.binding = call.binding  # for the count of errors and their headers
    echoes: dict[str, str] = {}
    if body.echo:
        echoes = {name: services.chat.prompt_text(answer.generation.prompt) for name, answer in call.answers.items()}
    writer = CompletionWriter(call, body, services.chat.logprobs, echoes)
    return await respond(call, services.chat.generate(call), writer, request, is_streamed=body.stream)


@router.post("/v1/embeddings", status_code=404)
async def create_embedding() -> Response:
    """There are no embeddings: a model that predicts the next token makes poor ones."""
    raise NotFoundError(
        "this server makes no embeddings: its base model predicts the next token, and what could be averaged from it "
        "compares texts badly; use a model that was trained for embeddings"
    )
