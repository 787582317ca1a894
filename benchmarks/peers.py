"""Whom we are compared with: figures that were recorded, and servers that are running beside us."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.errors import ConfigurationError
from benchmarks.over_http import Choice, Endpoint

__all__ = ["RECORDED", "RECORDED_CONDITIONS", "RecordedPeer", "parse_peers"]

_LORA_PREFIX = "lora:"
_NUM_ADAPTERS = 8


@dataclass(frozen=True, slots=True)
class RecordedPeer:
    """Tokens a second of a peer by clients at once: one adapter for 1, eight adapters mixed for 8 and 32."""

    key: str
    name: str
    tokens_per_second: dict[int, float]


RECORDED = (
    RecordedPeer("vllm", "vLLM 0.32 CPU build (bf16)", {1: 10, 8: 47, 32: 80}),
    RecordedPeer("llama.cpp", "llama.cpp server (Q4_1)", {1: 69, 8: 70, 32: 62}),
)
RECORDED_CONDITIONS = (
    "rows with a recorded peer divide this run's figure by one that was recorded in another run on the same kind of "
    "machine (2 cores of an AMD EPYC with AVX512-BF16, SmolLM2-135M, adapters of rank 8 on all linear layers, 64 new "
    "tokens a request, streamed): they are no comparison on this machine; --peer makes one"
)


def parse_peers(peers: list[str], models: list[str]) -> tuple[Endpoint, ...]:
    """Endpoints from `NAME=URL` and `NAME=BASE,ADAPTER,...` on the command line.

    An adapter written `lora:3` is chosen by llama.cpp's field `lora` instead of by a model's name. Without a list of
    models a peer is asked for `base` and `bench-01` to `bench-08`, the names that `benchmarks.adapters8` gives.

    Raises:
        ConfigurationError: not of that form, or models for a peer that is not given.
    """
    urls = dict(_split(text, "--peer NAME=URL") for text in peers)
    named = dict(_split(text, "--peer-model NAME=BASE,ADAPTER,...") for text in models)
    if strangers := sorted(set(named) - set(urls)):
        raise ConfigurationError(f"--peer-model names {strangers[0]!r}, but there is no --peer {strangers[0]}=URL")
    return tuple(_endpoint(name, url, named.get(name)) for name, url in urls.items())


def _endpoint(name: str, url: str, models: str | None) -> Endpoint:
    names = models.split(",") if models else ["base", *(f"bench-{n:02d}" for n in range(1, _NUM_ADAPTERS + 1))]
    if len(names) < 2:
        raise ConfigurationError(f"--peer-model {name}={models}: expected the base model and at least one adapter")
    base, *adapters = names
    return Endpoint(
        name,
        url.removesuffix("/").removesuffix("/v1"),
        Choice(base),
        tuple(_choice(base, adapter) for adapter in adapters),
    )


def _choice(base: str, adapter: str) -> Choice:
    if not adapter.startswith(_LORA_PREFIX):
        return Choice(adapter)
    number = adapter.removeprefix(_LORA_PREFIX)
    if not number.isdecimal():
        raise ConfigurationError(f"{adapter!r}: expected a number behind {_LORA_PREFIX}")
    return Choice(base, {"lora": [{"id": int(number), "scale": 1.0}]})


def _split(text: str, form: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise ConfigurationError(f"expected {form}, found {text!r}")
    return name, value
