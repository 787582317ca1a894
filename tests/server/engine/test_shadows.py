"""Shadows: they take what nobody else needs, and change nothing for anybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import ConflictError
from server.engine.core import Constraint, EngineEvent, GenerationRequest
from server.engine.scheduler import MAX_SHADOWS, Engine
from tests.support.engine import (
    RECIPES,
    Answer,
    Bench,
    GatedReader,
    Reference,
    SetClock,
    ask,
    collect,
    drain,
    expected_tokens,
    make_bench,
    run_to_end,
    wait_for_loads,
)

FIRST, SECOND, THIRD, FOURTH = RECIPES
Act = tuple[str, int, int]


@pytest.fixture(scope="module")
def narrow(tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]) -> Bench:
    """An engine's model with few places: 3 rows, 2 slots, 12 blocks."""
    return make_bench(
        tiny_folders["llama"], adapter_folders["llama"], num_slots=2, max_batch=3, max_context=96, cache_tokens=192
    )


def _shadow(name: str, prompt: str, digest: str | None = None, **options: Any) -> GenerationRequest:
    return replace(ask(name, prompt, digest, **options), is_shadow=True)


def _warm(engine: Engine, *digests: str) -> None:
    run_to_end(engine, *(ask(f"warm {digest}", "x", digest, max_tokens=1) for digest in digests))


def _play(engine: Engine, acts: Sequence[Act], *, with_shadows: bool) -> tuple[list[list[EngineEvent]], set[str]]:
    """The live requests' events, step by step, and how the shadows ended."""
    seen: list[list[EngineEvent]] = []
    ends: set[str] = set()

    def note(events: Sequence[EngineEvent] = ()) -> None:
        seen.append([replace(event, queued_s=None) for event in events if not event.request_id.startswith("shadow")])
        ends.update(str(event.finish_reason) for event in events if event.request_id.startswith("shadow"))

    for number, (kind, which, size) in enumerate(acts):
        digest = (None, FIRST, SECOND, THIRD)[which]
        if kind == "shadow" and not with_shadows:
            note()
        elif kind == "live":
            note(engine.submit(ask(f"live {number}", "p" * size, digest, max_tokens=1 + size % 7)))
        elif kind == "shadow":
            # A live request that finds its version there by a shadow is sooner: no harm, but not the same.
            is_there = digest is None or digest in engine.residency.resident
            digest = digest if is_there and which != 3 else FOURTH
            note(engine.submit(_shadow(f"shadow {number}", "p" * size, digest, max_tokens=9)))
        elif kind == "pin":
            note(engine.set_pinned((THIRD,) if which % 2 else ()))  # no shadow brings that one
        elif kind == "unload":
            note(engine.unload((FIRST, SECOND)[which % 2]))
        elif kind == "cancel":
            note(engine.cancel(f"live {number - size % 3}"))
        else:
            wait_for_loads(engine)
            note(engine.step())
    while engine.num_running or engine.num_waiting:
        wait_for_loads(engine)
        note(engine.step())
    drain(engine, {})
    return seen, ends


KINDS = ("live", "step", "step", "step", "shadow", "shadow", "cancel", "pin", "unload")
ACTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3), st.integers(1, 40)), min_size=4, max_size=24)


@settings(max_examples=25)
@given(acts=ACTS, warm=st.sampled_from([(), (FIRST,), (FIRST, SECOND)]), max_host_bytes=st.sampled_from([0, 1 << 30]))
def test_live_requests_get_the_same_in_the_same_step_when_there_are_shadows(
    acts: list[Act], warm: tuple[str, ...], max_host_bytes: int, narrow: Bench
) -> None:
    """Order, text and end of every live request, whatever rows, blocks, slots and host cache are short of."""
    played = []
    for with_shadows in (False, True):
        # How much of a prompt is read in a step must not hang on the clock.
        engine = narrow.engine(max_stall_s=1e9, max_host_bytes=max_host_bytes)
        _warm(engine, *warm)
        played.append(_play(engine, acts, with_shadows=with_shadows)[0])
        assert engine.is_idle
        assert engine.blocks.num_available == engine.blocks.num_blocks
        assert set(engine.residency.resident.values()) <= {0}
        engine.close()
    without, beside = played
    assert without == beside


def test_shadow_gets_its_versions_answer_when_nobody_else_is_there(bench: Bench, reference_answers: Reference) -> None:
    """The tokens that a live request would get."""
    engine = bench.engine()
    _warm(engine, FIRST)
    request = _shadow("shadow", "hello", FIRST)
    tokens, reason = expected_tokens(reference_answers, request, bench.base.tokenizer.eos_token_id)
    answer = run_to_end(engine, request)["shadow"]
    assert (tokens, reason, 1) == (answer.tokens, answer.finish_reason, answer.num_terminal)
    engine.close()


def test_shadow_stands_still_when_a_live_request_runs(bench: Bench, reference_answers: Reference) -> None:
    """It is computed in no step of the live one, and goes on to the right end when that is done."""
    engine = bench.engine()
    _warm(engine, FIRST)
    shadow = _shadow("shadow", "hello", FIRST)
    tokens, _ = expected_tokens(reference_answers, shadow, bench.base.tokenizer.eos_token_id)
    answers: dict[str, Answer] = {}
    collect(engine.submit(shadow), answers)
    collect(engine.step(), answers)
    collect(engine.submit(ask("live", "and now", max_tokens=6, ignore_eos=True)), answers)
    assert (0, 1, 1) == (engine.num_running, engine.num_waiting, engine.num_shadows)
    before = answers["shadow"].completion_tokens
    while "live" not in answers or answers["live"].finish_reason is None:
        collect(engine.step(), answers)
        assert before == answers["shadow"].completion_tokens
    drain(engine, answers)
    assert (tokens, "length") == (answers["shadow"].tokens, answers["live"].finish_reason)
    engine.close()


def test_shadow_gives_way_when_a_live_request_needs_its_place(narrow: Bench) -> None:
    """A row: with three live ones there is no place for it; it ends at once, and tells why."""
    engine = narrow.engine()
    answers: dict[str, Answer] = {}
    collect(engine.submit(_shadow("shadow", "hello", max_tokens=9)), answers)
    collect(engine.step(), answers)
    for number in range(3):
        collect(engine.submit(ask(f"live {number}", "p", max_tokens=4)), answers)
    collect(engine.step(), answers)
    assert ("dropped", "it gave way to other requests", 3) == (
        answers["shadow"].finish_reason, answers["shadow"].error, engine.num_running,
    )  # fmt: skip
    drain(engine, answers)
    assert {1} == {answer.num_terminal for answer in answers.values()}
    engine.close()


def test_shadow_is_dropped_at_once_when_the_engine_is_busy(narrow: Bench) -> None:
    """It never queues: while others wait, without a row, beside enough shadows, or with a version in no slot."""
    engine = narrow.engine()

    def offer(name: str = "shadow", digest: str | None = None, **options: Any) -> str:
        events = engine.submit(_shadow(name, "hello", digest, **options))
        return "taken" if not events else f"{events[0].finish_reason}: {events[0].error}"

    engine.submit(ask("waits", "p", max_tokens=2))
    assert "dropped: other requests wait" == offer()
    for number in range(3):
        engine.submit(ask(f"live {number}", "p" * 10, max_tokens=9, ignore_eos=True))
    while engine.num_waiting:
        engine.step()
    assert 3 == engine.num_running
    assert "dropped: the batch or the KV cache has no room" == offer()
    drain(engine, {})
    assert "dropped: its version is in no slot" == offer(digest=FIRST)
    wait_for_loads(engine)
    engine.step()
    assert "taken" == offer(digest=FIRST)  # it was read meanwhile, since a slot was free
    assert "dropped: the form of its answer is not compiled" == offer(
        "form", constraint=Constraint("choices", choices=("yes", "no"))
    )
    drain(engine, {})
    engine.close()


def test_shadows_are_few_when_many_are_offered(bench: Bench) -> None:
    """They would only wait for each other."""
    engine = bench.engine()
    taken = [not engine.submit(_shadow(f"shadow {number}", "hello", max_tokens=3)) for number in range(6)]
    assert [True] * MAX_SHADOWS + [False] * (6 - MAX_SHADOWS) == taken
    drain(engine, {})
    assert engine.is_idle
    engine.close()


def test_version_of_shadows_is_the_first_to_go_when_a_slot_is_needed(narrow: Bench) -> None:
    """A live version that was used before it stays."""
    engine = narrow.engine()
    _warm(engine, FIRST)
    engine.submit(_shadow("shadow", "x", SECOND))
    wait_for_loads(engine)
    engine.step()
    run_to_end(engine, _shadow("again", "x", SECOND, max_tokens=2))
    assert {FIRST, SECOND} == set(engine.residency.resident)
    run_to_end(engine, ask("live", "x", THIRD, max_tokens=2))
    assert {FIRST, THIRD} == set(engine.residency.resident)
    engine.close()


def test_shadow_reads_nothing_when_no_slot_is_free(narrow: Bench) -> None:
    """No version loses its slot for it, and the loader stays free for others."""
    engine = narrow.engine()
    _warm(engine, FIRST, SECOND)
    (event,) = engine.submit(_shadow("shadow", "x", THIRD))
    assert ("dropped", False) == (event.finish_reason, engine.residency.is_loading)
    assert {FIRST, SECOND} == set(engine.residency.resident)
    engine.close()


def test_live_read_waits_for_nobody_when_a_shadows_version_is_being_read(narrow: Bench) -> None:
    """The shadow's read hangs in a thread of its own, and is forgotten: the live one gets the slot."""
    shelf = GatedReader(narrow.read)
    live_shelf = lambda digest: (shelf if digest == FOURTH else narrow.read)(digest)  # noqa: E731
    engine = narrow.engine(read=live_shelf)
    engine.submit(_shadow("shadow", "x", FOURTH))
    answers: dict[str, Answer] = {}
    collect(engine.submit(ask("live", "x", FIRST, max_tokens=2)), answers)
    collect(engine.submit(ask("other", "x", SECOND, max_tokens=2)), answers)
    while engine.num_running or engine.num_waiting:
        engine.residency._loader.submit(bool).result()
        collect(engine.step(), answers)
    assert ({FIRST, SECOND}, ["length"] * 2) == (
        set(engine.residency.resident), [answer.finish_reason for answer in answers.values()],
    )  # fmt: skip
    shelf.open()
    wait_for_loads(engine)
    engine.step()
    assert {FIRST, SECOND} == set(engine.residency.resident)
    engine.close()


def test_shadows_version_takes_no_room_on_the_host_when_it_lost_its_slot(narrow: Bench) -> None:
    """A version that others used is read again to be at hand; one that shadows used alone is gone."""
    engine = narrow.engine()
    _warm(engine, FIRST)
    engine.submit(_shadow("shadow", "x", FOURTH))
    wait_for_loads(engine)
    engine.step()
    run_to_end(engine, ask("live", "x", SECOND, max_tokens=2))
    while engine.residency.is_loading:
        wait_for_loads(engine)
        engine.step()
    assert {FIRST, SECOND} == {residence.digest for residence in engine.residency.report()}
    assert 0 == engine.residency.stats.num_evictions
    engine.close()


def test_shadow_is_dropped_and_nobody_else_when_its_version_can_not_be_read(narrow: Bench) -> None:
    """The engine goes on, and reads it again for the next one."""
    shelf = GatedReader(narrow.read)
    shelf.open()
    shelf.failing = {FOURTH}
    engine = narrow.engine(read=shelf)
    for _ in range(2):
        (event,) = engine.submit(_shadow("shadow", "x", FOURTH))
        assert "dropped" == event.finish_reason
        wait_for_loads(engine)
        assert [] == engine.step()
    assert {} == engine.residency.resident
    run_to_end(engine, ask("live", "x", FIRST, max_tokens=2))
    engine.close()


@pytest.mark.parametrize("act", ["pin", "unload"])
def test_shadow_gives_way_when_slots_are_given_out_anew(act: str, narrow: Bench) -> None:
    """A slot that it holds can't be had by a pinned version, and would not be freed by unloading."""
    engine = narrow.engine()
    _warm(engine, FIRST, SECOND)
    assert [] == engine.submit(_shadow("shadow", "x", FIRST))
    events = engine.set_pinned((THIRD,)) if act == "pin" else engine.unload(FIRST)
    assert ["dropped"] == [event.finish_reason for event in events]
    wait_for_loads(engine)
    engine.step()
    assert ({SECOND, THIRD} if act == "pin" else {SECOND}) == set(engine.residency.resident)
    engine.close()


def test_shadow_goes_on_when_a_pinned_version_is_not_unloaded(narrow: Bench) -> None:
    """What is refused ends nobody."""
    engine = narrow.engine()
    engine.set_pinned((FIRST,))
    wait_for_loads(engine)
    engine.step()
    assert [] == engine.submit(_shadow("shadow", "x", FIRST))
    with pytest.raises(ConflictError, match="is pinned"):
        engine.unload(FIRST)
    assert 1 == engine.num_shadows
    drain(engine, {})
    engine.close()


def test_shadow_leaves_nothing_in_the_prefix_cache_when_it_has_ended(bench: Bench) -> None:
    """What is found there again was asked for by somebody; and nothing is taken from there for a shadow."""
    engine = bench.engine()
    run_to_end(engine, _shadow("shadow", "p" * 60, max_tokens=3))
    assert (0, engine.blocks.num_blocks) == (engine.blocks.num_cached, engine.blocks.num_free)
    for prompt in ("p" * 17, "q" * 17):
        run_to_end(engine, ask("live " + prompt, prompt, max_tokens=1))
    oldest = list(engine.blocks._idle)
    run_to_end(engine, _shadow("shadow", "p" * 60, max_tokens=3))
    assert oldest == list(engine.blocks._idle)
    engine.close()


def test_shadow_ends_when_it_is_cancelled_or_late(bench: Bench) -> None:
    """As others do."""
    clock = SetClock()
    engine = bench.engine(clock=clock)
    engine.submit(_shadow("left", "hello"))
    assert ["cancelled"] == [event.finish_reason for event in engine.cancel("left")]
    engine.submit(replace(_shadow("late", "hello"), timeout_s=5))
    clock.now += 6
    assert ["deadline"] == [event.finish_reason for event in engine.step()]
    assert (engine.is_idle, 0) == (True, engine.num_shadows)
    engine.close()


def test_shadow_follows_a_form_when_that_is_compiled(bench: Bench) -> None:
    """The live request before it had it compiled."""
    engine = bench.engine(tokenizer=bench.base.tokenizer)
    form = Constraint("choices", choices=("yes", "no"))
    live = run_to_end(engine, ask("live", "q", max_tokens=9, constraint=form))["live"]
    shadow = run_to_end(engine, _shadow("shadow", "q", max_tokens=9, constraint=form))["shadow"]
    assert (live.text, "stop") == (shadow.text, shadow.finish_reason)
    engine.close()
