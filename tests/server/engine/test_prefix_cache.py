"""Prompts that begin alike are read once per version, and a full cache makes requests wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.engine.kernels import BLOCK_TOKENS
from tests.support.engine import (
    RECIPES,
    Answer,
    Bench,
    Reference,
    ask,
    collect,
    drain,
    expected_tokens,
    run_to_end,
    slotted_layers,
)

FIRST, SECOND, *_ = RECIPES
SYSTEM = "you are a helpful assistant of a small firm; answer briefly. "


@contextmanager
def _counting_tokens(bench: Bench) -> Iterator[list[int]]:
    """How many tokens each step runs through the model."""
    counts: list[int] = []
    handle = bench.base.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: counts.append(output.shape[1])
    )
    yield counts
    handle.remove()


def test_shared_system_prompt_is_read_once_when_requests_of_a_version_follow(
    bench: Bench, reference_answers: Reference
) -> None:
    """The second request computes what differs, and its answer is that of `generate`."""
    engine = bench.engine(max_prefill_tokens=256)
    requests = [ask("one", SYSTEM + "what is it?", FIRST), ask("two", SYSTEM + "who are you?", FIRST)]
    run_to_end(engine, requests[0])
    with _counting_tokens(bench) as counts:
        answer = run_to_end(engine, requests[1])["two"]
    engine.close()

    shared = len(SYSTEM) // BLOCK_TOKENS * BLOCK_TOKENS
    assert len(requests[1].prompt) - shared == counts[0]
    eos = bench.base.tokenizer.eos_token_id
    assert expected_tokens(reference_answers, requests[1], eos)[0] == answer.tokens


def test_prefix_of_another_version_is_never_used_when_the_prompt_is_the_same(
    bench: Bench, reference_answers: Reference
) -> None:
    """A swap of the version behind a name means another digest: everything is computed again, and right."""
    engine = bench.engine(max_prefill_tokens=256)
    for digest in (FIRST, SECOND, None):
        request = ask("r", SYSTEM, digest)
        with _counting_tokens(bench) as counts:
            answer = run_to_end(engine, request)["r"]
        assert len(request.prompt) == counts[0]
        eos = bench.base.tokenizer.eos_token_id
        assert expected_tokens(reference_answers, request, eos)[0] == answer.tokens
    engine.close()


def test_prefix_is_shared_by_running_requests_when_it_is_computed(bench: Bench, reference_answers: Reference) -> None:
    """Both read the same blocks at the same time; the first one's end takes nothing from the second."""
    engine = bench.engine(max_prefill_tokens=256)
    first, second = ask("one", SYSTEM + "a", max_tokens=3), ask("two", SYSTEM + "b", max_tokens=12)
    answers: dict[str, Answer] = {}
    collect(engine.submit(first), answers)
    collect(engine.step(), answers)
    collect(engine.submit(second), answers)
    drain(engine, answers)
    assert len(SYSTEM) // BLOCK_TOKENS * BLOCK_TOKENS == engine.blocks.num_hit_tokens
    engine.close()
    eos = bench.base.tokenizer.eos_token_id
    for request in (first, second):
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_prefix_of_a_failed_request_is_not_used_when_the_slot_is_mended(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """What a poisoned adapter computed is forgotten with the request that shows it."""
    bench = own_bench(max_batch=2)
    engine = bench.engine(max_prefill_tokens=256)
    engine.prefetch([FIRST])
    drain(engine, {})
    layer = next(iter(slotted_layers(bench.base.model).values()))
    kept = layer.slot_weights(1)[0].clone()
    layer.slot_weights(1)[0].fill_(float("nan"))
    assert "engine_failed" == run_to_end(engine, ask("bad", SYSTEM, FIRST))["bad"].finish_reason
    layer.slot_weights(1)[0].copy_(kept)

    request = ask("good", SYSTEM, FIRST)
    answer = run_to_end(engine, request)["good"]

    engine.close()
    assert expected_tokens(reference_answers, request, bench.base.tokenizer.eos_token_id)[0] == answer.tokens


def test_requests_wait_when_the_cache_is_full_and_all_are_answered(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """Room for two requests at a time, six come: nobody fails, and nobody gets another's tokens."""
    bench = own_bench(max_batch=6, max_context=64, cache_tokens=8 * BLOCK_TOKENS)
    engine = bench.engine(max_prefill_tokens=256)
    requests = [ask(f"r{index}", "y" * (30 + index), [FIRST, None][index % 2], max_tokens=20) for index in range(6)]
    engine.prefetch([FIRST])
    drain(engine, {})
    answers: dict[str, Answer] = {}
    for request in requests:
        collect(engine.submit(request), answers)
    most = 0
    while not engine.is_idle:
        collect(engine.step(), answers)
        most = max(most, engine.num_running)
    assert 2 == most
    assert engine.blocks.num_blocks == engine.blocks.num_available
    engine.close()
    eos = bench.base.tokenizer.eos_token_id
    for request in requests:
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_submit_ends_in_an_event_when_the_request_is_longer_than_the_whole_cache(
    own_bench: Callable[..., Bench],
) -> None:
    """It could never run, so it is not queued."""
    bench = own_bench(max_batch=2, max_context=128, cache_tokens=4 * BLOCK_TOKENS)
    engine = bench.engine()
    events = engine.submit(ask("r", "x" * 60, max_tokens=10))
    engine.close()
    assert ["engine_failed"] == [event.finish_reason for event in events]
    assert f"1 to {4 * BLOCK_TOKENS} tokens" in str(events[0].error)
