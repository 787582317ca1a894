"""From a request's options to what the engine is asked for; refuses options that contradict each other."""

from __future__ import annotations

from adapters.errors import InvalidInputError
from server.completion_schemas import CompletionRequest
from server.config import ServeSettings
from server.engine.core import Constraint, SamplingParams
from server.schema_check import schema_text
from server.schemas import ChatRequest, GenerationOptions
from server.tools import ToolUse

__all__ = ["sampling_params"]


def sampling_params(
    body: GenerationOptions,
    *,
    num_prompt_tokens: int,
    vocab_size: int,
    settings: ServeSettings,
    tools: ToolUse | None = None,
) -> SamplingParams:
    """The engine's parameters for a request whose prompt takes so many tokens.

    Raises:
        InvalidInputError: options that contradict each other, or a token that doesn't exist; names the field.
    """
    wanted = body.token_limit if body.token_limit is not None else settings.max_tokens
    max_tokens = min(wanted, settings.max_context - num_prompt_tokens)
    _check_options(body, max_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=body.stop_strings + (tools.stop if tools else ()),
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body, vocab_size),
        top_logprobs=body.num_top_logprobs,
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        constraint=Constraint("grammar", grammar=tools.grammar) if tools and tools.grammar else _constraint(body),
    )


def _check_options(body: GenerationOptions, max_tokens: int) -> None:
    if isinstance(body, ChatRequest) and body.top_logprobs is not None and not body.logprobs:
        raise _refused("top_logprobs", "needs logprobs to be true")
    if isinstance(body, CompletionRequest):
        _check_completion_options(body)
    if body.wants_usage and not body.stream:
        raise _refused("stream_options", "include_usage needs stream to be true")
    if body.min_tokens > max_tokens:
        raise _refused("min_tokens", f"{body.min_tokens} is more than the answer may take, {max_tokens}")


def _check_completion_options(body: CompletionRequest) -> None:
    if body.echo and body.logprobs is not None:
        raise _refused("echo", "there are no log-probabilities of prompts; leave echo or logprobs out")
    if body.best_of not in (None, body.n):
        raise _refused("best_of", f"answers are not ranked: expected {body.n}, as many as n, found {body.best_of}")


def _logit_bias(body: GenerationOptions, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    if unknown := [token for token in biases if token >= vocab_size]:
        raise _refused("logit_bias", f"there is no token {unknown[0]}; the vocabulary has {vocab_size}")
    return tuple(biases.items())


def _constraint(body: GenerationOptions) -> Constraint | None:
    constraint = _form_of(body)
    if constraint is None:
        return None
    field = "guided_choice" if constraint.kind == "choices" else "response_format"
    for other in ("min_tokens", "ignore_eos"):
        if getattr(body, other):
            raise _refused(other, f"{field} decides where the answer ends; leave one of them out")
    if constraint.kind == "choices" and body.stop_strings:
        raise _refused("stop", "guided_choice gives whole answers; leave one of them out")
    return constraint


def _form_of(body: GenerationOptions) -> Constraint | None:
    wanted = body.response_format
    kind = "text" if wanted is None else wanted.type
    if wanted is not None and (wanted.json_schema is None) == (kind == "json_schema"):
        raise _refused("response_format", "json_schema goes with the type json_schema, and with no other")
    if body.guided_choice is None:
        if wanted is None or wanted.type == "text":
            return None
        schema = "" if wanted.json_schema is None else schema_text(wanted.json_schema.definition)
        return Constraint(wanted.type, schema=schema)
    if kind != "text":
        raise _refused("guided_choice", "response_format asks for another form; leave one of them out")
    return Constraint("choices", choices=tuple(body.guided_choice))


def _refused(field: str, why: str) -> InvalidInputError:
    return InvalidInputError(f"{field}: {why}", param=field)
