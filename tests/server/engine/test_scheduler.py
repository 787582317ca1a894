"""The engine's loop: how answers end, who joins and leaves, and that one failure is one failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.core import EngineTimings
from server.engine.pacing import PrefillPacer
from server.engine.scheduler import Engine
from tests.support.engine import (
    RECIPES,
    Answer,
    Bench,
    Reference,
    SetClock,
    TokenText,
    ask,
    collect,
    drain,
    expected_tokens,
    run_to_end,
    slotted_layers,
)
from tests.support.tiny import make_tokenizer

FIRST, SECOND, *_ = RECIPES
PROMPT = "hello there, my old friend"


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    """An engine that nobody else uses, over the shared model."""
    made = bench.engine()
    yield made
    made.close()


class _FailingStep:
    """Makes a real model raise in its n-th forward pass from now."""

    def __init__(self, model: Any, *, at: int = 1) -> None:
        self._left = at
        self._handle = model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._left -= 1
        if self._left == 0:
            self._handle.remove()
            raise RuntimeError("out of memory")


def test_answer_ends_with_length_when_max_tokens_are_reached(engine: Engine, reference_answers: Reference) -> None:
    """Exactly as many tokens as were asked for, and the reason says so."""
    request = ask("r", PROMPT, max_tokens=5)
    answer = run_to_end(engine, request)["r"]
    assert reference_answers.tokens(request.prompt, None, 5) == answer.tokens
    assert (
        answer.finish_reason,
        answer.completion_tokens,
        answer.num_terminal,
        answer.error,
    ) == ("length", 5, 1, None)


def test_answer_ends_with_stop_when_the_end_of_sequence_comes(bench: Bench, reference_answers: Reference) -> None:
    """The end-of-sequence token ends the answer, is counted and is not shown."""
    request = ask("r", PROMPT, max_tokens=10)
    tokens = reference_answers.tokens(request.prompt, None, 10)
    place = next(index for index in range(2, 10) if tokens.index(tokens[index]) == index)
    engine = bench.engine(tokenizer=TokenText(tokens[place]))

    answer = run_to_end(engine, request)["r"]

    engine.close()
    assert (tokens[:place], "stop", place + 1) == (answer.tokens, answer.finish_reason, answer.completion_tokens)


def test_answer_ends_with_stop_when_the_models_own_config_names_an_end(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """A chat model may have an end-of-turn token that its tokenizer doesn't know as the end."""
    bench = own_bench(max_batch=1)
    request = ask("r", PROMPT, max_tokens=10)
    tokens = reference_answers.tokens(request.prompt, None, 10)
    bench.base.model.generation_config.eos_token_id = [tokens[3], 0]
    engine = bench.engine()

    answer = run_to_end(engine, request)["r"]

    engine.close()
    place = tokens.index(tokens[3])
    assert (tokens[:place], "stop") == (answer.tokens, answer.finish_reason)


def test_answer_ends_with_stop_when_the_chat_template_ends_turns_with_a_token_of_its_own(
    bench: Bench, reference_answers: Reference
) -> None:
    """What training teaches as the end of a turn ends it here, though neither tokenizer nor model call it an end."""
    request = ask("r", PROMPT, max_tokens=10)
    tokens = reference_answers.tokens(request.prompt, None, 10)
    place = next(i for i, token in enumerate(tokens) if tokens.index(token) == i > 0)
    tokenizer = make_tokenizer()
    end = str(tokenizer.convert_ids_to_tokens(tokens[place]))
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    engine = bench.engine(tokenizer=tokenizer)

    answer = run_to_end(engine, request)["r"]

    engine.close()
    assert (place + 1, "stop") == (answer.completion_tokens, answer.finish_reason)


def test_answer_is_cut_before_the_stop_string_when_it_spans_tokens(
    engine: Engine, reference_answers: Reference
) -> None:
    """A stop string of two tokens ends the answer as soon as it is whole; neither of them is shown."""
    plain = ask("r", PROMPT, max_tokens=10)
    tokens = reference_answers.tokens(plain.prompt, None, 10)
    text = TokenText(0).decode(tokens)
    stop = text[4:6]

    answer = run_to_end(engine, ask("r", PROMPT, max_tokens=10, stop=("never", stop)))["r"]

    place = text.index(stop)
    assert (text[:place], "stop", place + 2) == (answer.text, answer.finish_reason, answer.completion_tokens)


def test_answer_shows_held_text_when_only_the_beginning_of_a_stop_string_came(
    engine: Engine, reference_answers: Reference
) -> None:
    """The text that might have become a stop string is shown once the answer's length is reached."""
    tokens = reference_answers.tokens(ask("r", PROMPT).prompt, None, 6)
    text = TokenText(0).decode(tokens)
    answer = run_to_end(engine, ask("r", PROMPT, max_tokens=6, stop=(text[-2:] + "x",)))["r"]
    assert (text, "length") == (answer.text, answer.finish_reason)


def test_answer_is_whole_text_when_the_tokenizer_is_the_models_own(bench: Bench, reference_answers: Reference) -> None:
    """With a byte-level tokenizer the pieces join to what decoding everything at once gives."""
    engine = bench.engine(tokenizer=make_tokenizer())
    request = ask("r", PROMPT, FIRST, max_tokens=30)
    answer = run_to_end(engine, request)["r"]
    engine.close()
    assert reference_answers.text(request.prompt, FIRST, 30) == answer.text


def test_cancel_frees_the_row_at_once_when_the_request_runs(bench: Bench, reference_answers: Reference) -> None:
    """The next step admits who waited for the row; the cancelled request has one event and no more."""
    rows = bench.runner.cache.num_rows
    engine = bench.engine(max_prefill_tokens=256)
    answers: dict[str, Answer] = {}
    requests = [ask(f"r{index}", PROMPT, max_tokens=20) for index in range(rows + 1)]
    for request in requests:
        collect(engine.submit(request), answers)
    collect(engine.step(), answers)
    assert (rows, 1) == (engine.num_running, engine.num_waiting)

    collect(engine.cancel("r0"), answers)
    assert (rows - 1, 1) == (engine.num_running, engine.num_waiting)
    collect(engine.step(), answers)

    assert (rows, 0) == (engine.num_running, engine.num_waiting)
    drain(engine, answers)
    engine.close()
    assert (answers["r0"].finish_reason, answers["r0"].num_terminal, len(answers["r0"].tokens)) == ("cancelled", 1, 1)
    expected = expected_tokens(reference_answers, requests[-1], bench.base.tokenizer.eos_token_id)[0]
    assert expected == answers[f"r{rows}"].tokens


def test_cancel_takes_a_request_out_of_the_queue_when_it_waits(engine: Engine) -> None:
    """It ends with one event and is never computed."""
    assert engine.submit(ask("r", PROMPT, FIRST)) == []
    assert [event.finish_reason for event in engine.cancel("r")] == ["cancelled"]
    assert engine.num_waiting == 0
    answers: dict[str, Answer] = {}
    drain(engine, answers)
    assert answers == {}


def test_cancel_says_nothing_when_the_request_is_unknown(engine: Engine) -> None:
    """It may have ended in the same moment, and its terminal event was sent."""
    run_to_end(engine, ask("r", "x", max_tokens=1))
    assert engine.cancel("r") == []
    assert engine.cancel("never") == []


def test_cancel_releases_the_version_when_the_request_runs(engine: Engine) -> None:
    """Nobody counts as user of the slot any more."""
    engine.prefetch([FIRST])
    drain(engine, {})
    engine.submit(ask("r", PROMPT, FIRST))
    engine.step()
    assert engine.residency.resident == {FIRST: 1}
    engine.cancel("r")
    assert engine.residency.resident == {FIRST: 0}
    assert engine.is_idle


def test_deadline_ends_running_and_waiting_requests_when_its_time_has_come(
    bench: Bench, reference_answers: Reference
) -> None:
    """At the next step each late request has its one event, its place is free, and the others go on undisturbed."""
    clock = SetClock()
    rows = bench.runner.cache.num_rows
    engine = bench.engine(max_prefill_tokens=256, clock=clock)
    answers: dict[str, Answer] = {}
    requests = [replace(ask(f"r{index}", PROMPT, max_tokens=6), timeout_s=60 + index) for index in range(rows + 2)]
    requests[rows] = replace(requests[rows], timeout_s=60)
    requests[rows + 1] = replace(requests[rows + 1], timeout_s=None)
    for request in requests:
        collect(engine.submit(request), answers)
    collect(engine.step(), answers)
    clock.now += 59.9
    collect(engine.step(), answers)
    assert (rows, 2) == (engine.num_running, engine.num_waiting)

    clock.now += 0.1
    collect(engine.step(), answers)

    late = ["r0", f"r{rows}"]
    assert (rows, 0) == (engine.num_running, engine.num_waiting), "who waited behind them has the place"
    assert late == sorted(name for name, answer in answers.items() if answer.finish_reason == "deadline")
    drain(engine, answers)
    engine.close()
    assert {"the answer was not finished within its 60 seconds"} == {answers[name].error for name in late}
    assert {1} == {answer.num_terminal for answer in answers.values()}
    eos = bench.base.tokenizer.eos_token_id
    for request in requests:
        if request.id not in late:
            assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_client_is_charged_for_what_it_used_when_its_answer_ends_early(own_bench: Callable[..., Bench]) -> None:
    """Of two clients the one that asked for much and took little is next, before one that used more than that."""
    engine = own_bench(max_batch=1).engine()
    for name, prompt, max_tokens in (("ann0", "x", 90), ("ann1", "x", 1), ("bob0", PROMPT, 1), ("bob1", PROMPT, 1)):
        engine.submit(replace(ask(name, prompt, max_tokens=max_tokens), client=name[:3]))
    engine.step()
    engine.cancel("ann0")
    answers: dict[str, Answer] = {}
    drain(engine, answers)
    engine.close()
    assert ["bob0", "ann1", "bob1"] == list(answers)


def test_queue_time_comes_with_the_first_event_when_a_request_has_waited(bench: Bench) -> None:
    """It is measured from submission to the place in the batch, and told once while the answer runs."""
    clock = SetClock()
    engine = bench.engine(clock=clock)
    engine.submit(ask("r", "x", max_tokens=3))
    engine.submit(ask("gone", "x"))
    clock.now += 5
    assert [5] == [event.queued_s for event in engine.cancel("gone")]
    events = [event for _ in range(3) for event in engine.step()]
    engine.close()
    assert [5, None, 5] == [event.queued_s for event in events]


def test_timings_tell_steps_apart_when_some_have_prefill(engine: Engine) -> None:
    """One entry a step that computed, handed out once; a load has an entry with its outcome."""
    run_to_end(engine, ask("r", "x" * 20, max_tokens=4))
    timings = engine.take_timings()
    assert [True, True, False, False, False] == [step.has_prefill for step in timings.steps]
    assert all(step.seconds > 0 for step in timings.steps)
    run_to_end(engine, ask("a", "x", FIRST, max_tokens=1), ask("b", "x", "f" * 64, max_tokens=1))
    loads = {load.digest: load for load in engine.take_timings().loads}
    assert {FIRST: True, "f" * 64: False} == {digest: load.is_loaded for digest, load in loads.items()}
    assert all(load.seconds > 0 for load in loads.values())
    assert EngineTimings() == engine.take_timings()


@pytest.mark.parametrize("extra", [1, 1000])
def test_submit_ends_in_an_event_when_prompt_and_answer_do_not_fit(extra: int, engine: Engine, bench: Bench) -> None:
    """A request that is longer than a row is answered at once and never queued."""
    room = bench.runner.cache.max_tokens
    request = ask("r", PROMPT, max_tokens=room - len(PROMPT) + extra)
    events = engine.submit(request)
    assert [event.finish_reason for event in events] == ["engine_failed"]
    assert f"1 to {room} tokens" in str(events[0].error)
    assert engine.is_idle


def test_submit_ends_in_an_event_when_the_prompt_is_empty(engine: Engine) -> None:
    """There is nothing to compute a first token from."""
    assert [event.finish_reason for event in engine.submit(ask("r", ""))] == ["engine_failed"]


def test_answer_fills_its_row_when_prompt_and_answer_just_fit(engine: Engine, bench: Bench) -> None:
    """The last token that fits is computed, not refused."""
    room = bench.runner.cache.max_tokens
    answer = run_to_end(engine, ask("r", PROMPT, max_tokens=room - len(PROMPT)))["r"]
    assert None is answer.error
    assert answer.finish_reason == "stop" or room - len(PROMPT) == answer.completion_tokens


@pytest.mark.parametrize("at", [1, 3])
def test_step_failure_ends_its_requests_when_the_model_raises_once(
    at: int, own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """Each request of the step gets one event; those in the queue and those that come later are answered right."""
    bench = own_bench(max_batch=2)
    engine = bench.engine(max_prefill_tokens=256)
    engine.prefetch([FIRST])
    drain(engine, {})
    requests = [ask(f"r{index}", PROMPT, digest) for index, digest in enumerate([FIRST, None, FIRST, None])]
    _FailingStep(bench.base.model, at=at)

    answers = run_to_end(engine, *requests)

    later = run_to_end(engine, ask("later", PROMPT, FIRST))["later"]
    engine.close()
    assert [answers[name].finish_reason for name in ("r0", "r1")] == ["engine_failed"] * 2
    assert [answers[request.id].num_terminal for request in requests] == [1, 1, 1, 1]
    assert engine.residency.resident == {FIRST: 0}
    eos = bench.base.tokenizer.eos_token_id
    for request, answer in [(requests[2], answers["r2"]), (requests[3], answers["r3"]), (requests[0], later)]:
        assert expected_tokens(reference_answers, request, eos)[0] == answer.tokens


def test_step_failure_spares_a_request_when_it_had_no_work_in_the_step(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """A request that waits for its share of the prompt budget is not in the failed step, and goes on."""
    bench = own_bench(max_batch=2)
    engine = bench.engine(max_prefill_tokens=4)
    _FailingStep(bench.base.model)
    requests = [ask("first", PROMPT), ask("second", PROMPT)]
    answers = run_to_end(engine, *requests)
    engine.close()
    expected = expected_tokens(reference_answers, requests[1], bench.base.tokenizer.eos_token_id)[0]
    assert ("engine_failed", expected) == (answers["first"].finish_reason, answers["second"].tokens)


def test_failure_does_not_tell_the_exceptions_text_when_the_model_raises(own_bench: Callable[..., Bench]) -> None:
    """What the client sees names no internals."""
    bench = own_bench(max_batch=1)
    engine = bench.engine()
    _FailingStep(bench.base.model)
    answer = run_to_end(engine, ask("r", "x"))["r"]
    engine.close()
    assert answer.error == "the model failed while it computed this answer"


def _poison(bench: Bench, slot: int) -> None:
    for layer in slotted_layers(bench.base.model).values():
        layer.slot_weights(slot)[0].fill_(float("nan"))


def test_nan_in_a_slot_fails_only_its_own_requests_when_others_run_beside_it(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """An A that turns to NaN on the device ends the requests on it; other versions and the base go on.

    A B that is not finite would reach every token of the batch (0 * NaN); loading refuses it.
    """
    bench = own_bench(max_batch=4)
    engine = bench.engine(max_prefill_tokens=256)
    engine.prefetch([FIRST, SECOND])
    drain(engine, {})
    assert engine.residency.resident == {FIRST: 0, SECOND: 0}
    _poison(bench, 1)  # slots are handed out from the first
    requests = [ask("bad", PROMPT, FIRST), ask("good", PROMPT, SECOND), ask("base", PROMPT)]

    answers = run_to_end(engine, *requests)

    engine.close()
    assert (answers["bad"].finish_reason, answers["bad"].num_terminal) == ("engine_failed", 1)
    eos = bench.base.tokenizer.eos_token_id
    for request in requests[1:]:
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_next_request_in_the_row_is_answered_when_the_former_one_left_nan(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """What a failed request leaves in its cache row must not fail a shorter request that gets the row afterwards."""
    bench = own_bench(max_batch=2)
    engine = bench.engine(max_prefill_tokens=256)
    engine.prefetch([FIRST])
    drain(engine, {})
    _poison(bench, 1)
    failed = run_to_end(engine, ask("bad", PROMPT, FIRST))["bad"]
    assert failed.finish_reason == "engine_failed"
    requests = [ask("short", "x"), ask("long", PROMPT + PROMPT)]

    answers = run_to_end(engine, *requests)

    engine.close()
    eos = bench.base.tokenizer.eos_token_id
    for request in requests:
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_step_says_nothing_when_there_is_nothing_to_do(engine: Engine) -> None:
    """An idle engine computes nothing."""
    assert engine.is_idle
    assert engine.step() == []


def test_prompt_budget_bounds_a_step_when_many_prompts_wait(bench: Bench) -> None:
    """No step computes more prompt tokens than the budget, beside one token of each decoding request."""
    seen: list[int] = []
    handle = bench.base.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[1])
    )
    engine = bench.engine(max_prefill_tokens=10)
    run_to_end(engine, *(ask(f"r{index}", PROMPT, max_tokens=4) for index in range(4)))
    engine.close()
    handle.remove()
    assert max(seen) <= 10 + 4
    assert 4 * (len(PROMPT) + 3) == sum(seen)


def test_text_is_streamed_token_by_token_when_nothing_is_held_back(engine: Engine) -> None:
    """Every step of a decoding request brings one event with one token's text."""
    events = engine.submit(ask("r", "x", max_tokens=4))
    while not engine.is_idle:
        events += engine.step()
    assert [(len(event.text), event.completion_tokens) for event in events] == [(1, 1), (1, 2), (1, 3), (1, 4)]
    assert [event.finish_reason for event in events] == [None, None, None, "length"]


def test_warm_up_leaves_nothing_in_the_cache_when_it_ran(own_bench: Callable[..., Bench]) -> None:
    """The token that it computes is gone before the first request."""
    bench = own_bench(max_batch=1)
    assert 0 == sum(int(tensor.count_nonzero()) for tensor in bench.runner.cache.keys + bench.runner.cache.values)
    assert bench.runner.device == torch.device("cpu")


def test_next_request_is_answered_when_two_left_nan_in_one_step(
    own_bench: Callable[..., Bench], reference_answers: Reference
) -> None:
    """Two failures at once: neither the failed rows nor what was moved between them harms a later, shorter request."""
    bench = own_bench(max_batch=3)
    engine = bench.engine(max_prefill_tokens=256)
    engine.prefetch([FIRST])
    drain(engine, {})
    _poison(bench, 1)
    failed = run_to_end(engine, ask("bad1", PROMPT, FIRST), ask("bad2", PROMPT, FIRST))
    assert {answer.finish_reason for answer in failed.values()} == {"engine_failed"}

    requests = [ask("base1", PROMPT), ask("base2", PROMPT[:3]), ask("base3", PROMPT[:2])]
    answers = run_to_end(engine, *requests)

    engine.close()
    eos = bench.base.tokenizer.eos_token_id
    for request in requests:
        assert expected_tokens(reference_answers, request, eos)[0] == answers[request.id].tokens


def test_pace_is_not_learned_from_a_step_when_it_failed(own_bench: Callable[..., Bench]) -> None:
    """A pass that raises at once is fast, and says nothing about what a prompt costs."""
    bench = own_bench(max_batch=1)
    engine = bench.engine(max_prefill_tokens=64)
    engine._pacer = PrefillPacer(max_tokens=64, max_stall_s=1e-9)
    _FailingStep(bench.base.model)
    run_to_end(engine, ask("failed", "x" * 40))
    unknown = engine._pacer.budget(is_anybody_decoding=True)
    run_to_end(engine, ask("good", "x" * 40, max_tokens=1))
    engine.close()
    assert (64, 16) == (unknown, engine._pacer.budget(is_anybody_decoding=True))
