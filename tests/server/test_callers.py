"""What one key may take: a minute's worth at once, then a steady flow, and never more than its share at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import PermissionDeniedError, RateLimitError
from adapters.records import Actor, ApiKey, KeyLimits, Scope
from adapters.tables import utc_now
from server.callers import Caller, Meter, Meters
from tests.support.engine import SetClock


def _key(key_id: str = "key-1", *scopes: Scope, aliases: tuple[str, ...] | None = None) -> ApiKey:
    return ApiKey(key_id, "web", scopes or ("chat",), aliases, utc_now(), limits=KeyLimits(requests_per_minute=2))


def test_requests_are_refused_when_the_minutes_are_used_up() -> None:
    """The error says when one more flows in; until then nothing is counted."""
    clock = SetClock()
    meter = Meter(KeyLimits(requests_per_minute=6), clock=clock)
    for _ in range(6):
        meter.begin_request()
    for _ in range(3):
        with pytest.raises(RateLimitError, match="6 requests a minute") as error:
            meter.begin_request()
    assert 10 == error.value.retry_after_s
    clock.now += 9.9
    with pytest.raises(RateLimitError) as error:
        meter.begin_request()
    assert 1 == error.value.retry_after_s
    clock.now += 0.2
    meter.begin_request()


@given(
    per_minute=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 120, allow_nan=False), min_size=1, max_size=80),
)
def test_no_stretch_of_time_takes_more_than_a_burst_and_the_flow(per_minute: int, pauses: list[float]) -> None:
    """Between any two admissions lie at most a bucket's worth and what flowed in meanwhile."""
    clock = SetClock()
    meter = Meter(KeyLimits(requests_per_minute=per_minute), clock=clock)
    admitted = []
    for pause in pauses:
        clock.now += pause
        try:
            meter.begin_request()
        except RateLimitError:
            continue
        admitted.append(clock.now)
    assert admitted
    for first, start in enumerate(admitted):
        for last, end in enumerate(admitted[first:], start=first):
            assert last - first + 1 <= per_minute + (end - start) * per_minute / 60 + 1e-6


def test_requests_are_refused_when_too_many_run_at_once() -> None:
    """One that ends makes room; one that was refused takes none of the minute's."""
    meter = Meter(KeyLimits(requests_per_minute=4, max_concurrent=2), clock=SetClock())
    meter.begin_request()
    meter.begin_request()
    with pytest.raises(RateLimitError, match="2 requests running"):
        meter.begin_request()
    assert "2" == meter.headers()["x-ratelimit-remaining-requests"]
    meter.end_request()
    meter.begin_request()


def test_tokens_are_owed_when_an_answer_takes_more_than_is_left() -> None:
    """How long an answer gets is known at its end: the next prompt waits until what is owed has flowed in."""
    clock = SetClock()
    meter = Meter(KeyLimits(tokens_per_minute=60), clock=clock)
    meter.take_prompt(50)
    meter.take_answer(40)
    assert "0" == meter.headers()["x-ratelimit-remaining-tokens"]
    assert "90.000s" == meter.headers()["x-ratelimit-reset-tokens"]
    with pytest.raises(RateLimitError, match="60 tokens a minute") as error:
        meter.take_prompt(10)
    assert 40 == error.value.retry_after_s
    clock.now += 40
    meter.take_prompt(10)


def test_prompt_is_taken_when_it_is_longer_than_a_minutes_tokens() -> None:
    """Once the bucket is full: refusing it would be for ever."""
    clock = SetClock()
    meter = Meter(KeyLimits(tokens_per_minute=60), clock=clock)
    meter.take_answer(1)
    with pytest.raises(RateLimitError):
        meter.take_prompt(600)
    clock.now += 1
    meter.take_prompt(600)
    with pytest.raises(RateLimitError) as error:
        meter.take_prompt(1)
    assert 541 == error.value.retry_after_s


def test_prompts_tokens_are_there_again_when_it_was_not_computed() -> None:
    """And never more than a minute's worth."""
    clock = SetClock()
    meter = Meter(KeyLimits(tokens_per_minute=60), clock=clock)
    meter.take_prompt(60)
    clock.now += 30
    meter.return_prompt(60)
    assert "60" == meter.headers()["x-ratelimit-remaining-tokens"]


def test_headers_tell_limit_rest_and_reset_when_there_are_limits() -> None:
    """Under the names that OpenAI's clients know; a quiet key's bucket is full."""
    clock = SetClock()
    meter = Meter(KeyLimits(requests_per_minute=30, tokens_per_minute=600), clock=clock)
    meter.begin_request()
    meter.take_prompt(100)
    assert {
        "x-ratelimit-limit-requests": "30",
        "x-ratelimit-remaining-requests": "29",
        "x-ratelimit-reset-requests": "2.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10.000s",
    } == meter.headers()
    clock.now += 3600
    assert {"30", "600", "0.000s"} == set(meter.headers().values())


def test_nothing_is_refused_or_told_when_there_are_no_limits() -> None:
    """The local caller, and keys without limits."""
    meter = Meter()
    for _ in range(1000):
        meter.begin_request()
    meter.take_prompt(10**9)
    meter.take_answer(10**9)
    assert {} == meter.headers()


def test_meters_keep_one_for_each_key_when_they_are_asked_again() -> None:
    """What one key takes is not another's loss."""
    meters = Meters(SetClock())
    meters.of(_key("key-1")).begin_request()
    assert meters.of(_key("key-1")) is meters.of(_key("key-1"))
    assert "1" == meters.of(_key("key-1")).headers()["x-ratelimit-remaining-requests"]
    assert "2" == meters.of(_key("key-2")).headers()["x-ratelimit-remaining-requests"]


def test_caller_is_named_by_its_key_when_it_has_one() -> None:
    """In the engine, the logs and the database."""
    caller = Caller(_key("key-1", "chat", aliases=("legal",)), Meter())
    assert ("key-1", "key-1") == (caller.id, caller.client)
    assert Actor("key-1", "req_7", frozenset({"legal"})) == caller.actor("7")
    local = Caller.local()
    assert ("local", "") == (local.id, local.client)
    assert Actor("local", "req_7", None) == local.actor("7")


def test_caller_is_refused_when_it_lacks_a_scope() -> None:
    """Scopes include nothing but themselves; the message names what is missing."""
    caller = Caller(_key("key-1", "admin", "chat"), Meter())
    caller.check_scopes(frozenset({"admin", "chat"}))
    with pytest.raises(PermissionDeniedError, match="key-1 lacks the scope train"):
        caller.check_scopes(frozenset({"chat", "train"}))
    Caller.local().check_scopes(frozenset({"train"}))
