"""Who calls, and what they may still take: limits per key, kept in the API process. Knows no database."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from adapters.errors import PermissionDeniedError, RateLimitError
from adapters.records import Actor, ApiKey, KeyLimits, Scope

__all__ = ["Caller", "Meter", "Meters"]

_LOCAL = "local"


class Meter:
    """Counts what one key takes. Use it from one event loop only.

    Requests and tokens come from buckets that hold a minute's worth and fill steadily, so a key that was quiet may take
    a minute's worth at once. An answer's tokens are known at its end: they may leave the bucket owing, and what is
    owed has to flow in before the next request is taken.
    """

    def __init__(self, limits: KeyLimits | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        limits = limits or KeyLimits()
        self._requests = _Bucket("requests", limits.requests_per_minute, clock)
        self._tokens = _Bucket("tokens", limits.tokens_per_minute, clock)
        self._max_concurrent = limits.max_concurrent
        self._num_running = 0

    def begin_request(self) -> None:
        """Count a request that begins; `end_request` must follow if this returns.

        Raises:
            RateLimitError: too many are running, or began in the last minute; nothing was counted.
        """
        if self._max_concurrent is not None and self._num_running >= self._max_concurrent:
            raise RateLimitError(f"this API key may have {self._max_concurrent} requests running at once")
        self._requests.check(1)
        self._requests.take(1)
        self._num_running += 1

    def end_request(self) -> None:
        """A request that was begun has ended, well or not."""
        self._num_running -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """Count the tokens of a prompt before it is computed.

        Raises:
            RateLimitError: the minute's tokens are used up; nothing was counted.
        """
        self._tokens.check(num_tokens)
        self._tokens.take(num_tokens)

    def return_prompt(self, num_tokens: int) -> None:
        """Give back what was taken for a prompt that was not computed after all."""
        self._tokens.take(-num_tokens)

    def take_answer(self, num_tokens: int) -> None:
        """Count the tokens of an answer that has ended."""
        self._tokens.take(num_tokens)

    def headers(self) -> dict[str, str]:
        """What is left, under the names that OpenAI's clients know; nothing for what has no limit."""
        return self._requests.headers() | self._tokens.headers()


class Meters:
    """One meter a key. There are as many as keys that were used since the start."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._meters: dict[str, Meter] = {}

    def of(self, key: ApiKey) -> Meter:
        """The key's meter; its limits never change."""
        if key.id not in self._meters:
            self._meters[key.id] = Meter(key.limits, clock=self._clock)
        return self._meters[key.id]


@dataclass(frozen=True, slots=True)
class Caller:
    """An API key with its meter; `key` None is whoever is on this machine, on a server without keys."""

    key: ApiKey | None
    meter: Meter

    @classmethod
    def local(cls) -> Caller:
        """Somebody on this machine, with every scope and no limit."""
        return cls(None, Meter())

    @property
    def id(self) -> str:
        """What logs and the audit log say."""
        return _LOCAL if self.key is None else self.key.id

    @property
    def client(self) -> str:
        """Whom the engine is fair to: the key's id, or empty."""
        return "" if self.key is None else self.key.id

    def check_scopes(self, needed: frozenset[Scope]) -> None:
        """Let the caller pass if it has every scope that is needed.

        Raises:
            PermissionDeniedError: it lacks one; names it.
        """
        missing = needed - set(self.key.scopes) if self.key is not None else ()
        if missing:
            raise PermissionDeniedError(f"API key {self.id} lacks the scope {', '.join(sorted(missing))}")

    def actor(self, request_id: str) -> Actor:
        """On whose behalf the database is used for one of the caller's requests."""
        aliases = None if self.key is None or self.key.aliases is None else frozenset(self.key.aliases)
        return Actor(self.id, f"req_{request_id}", aliases)


class _Bucket:
    """A token bucket: fills steadily, holds a minute's worth, and may be left owing."""

    def __init__(self, unit: str, per_minute: int | None, clock: Callable[[], float]) -> None:
        self._unit = unit
        self._capacity = per_minute
        self._clock = clock
        self._level = float(per_minute or 0)
        self._filled_at = clock()

    def check(self, amount: int) -> None:
        """Raise RateLimitError unless so much is there; of more than the bucket ever holds, all that it holds."""
        if self._capacity is None:
            return
        self._fill(self._capacity)
        lacking = min(amount, self._capacity) - self._level
        if lacking > 0:
            wait_s = max(1, math.ceil(lacking * 60 / self._capacity))
            raise RateLimitError(
                f"this API key may take {self._capacity} {self._unit} a minute; try again in {wait_s} s",
                retry_after_s=wait_s,
            )

    def take(self, amount: int) -> None:
        """Take so much, whether it is there or not; a negative amount puts back."""
        if self._capacity is not None:
            self._fill(self._capacity)
            self._level -= amount

    def headers(self) -> dict[str, str]:
        """Capacity, what is there, and the time until it is full."""
        if self._capacity is None:
            return {}
        self._fill(self._capacity)
        full_in_s = (self._capacity - self._level) * 60 / self._capacity
        return {
            f"x-ratelimit-limit-{self._unit}": str(self._capacity),
            f"x-ratelimit-remaining-{self._unit}": str(max(0, math.floor(self._level))),
            f"x-ratelimit-reset-{self._unit}": f"{full_in_s:.3f}s",
        }

    def _fill(self, capacity: int) -> None:
        now = self._clock()
        self._level = min(float(capacity), self._level + (now - self._filled_at) * capacity / 60)
        self._filled_at = now
