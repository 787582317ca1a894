"""Peers as the command line names them."""

from __future__ import annotations

import pytest

from adapters.errors import ConfigurationError
from benchmarks.over_http import Choice, Endpoint
from benchmarks.peers import RECORDED, parse_peers
from benchmarks.table import TARGETS


def test_peer_has_our_names_when_it_names_no_models() -> None:
    """`/v1` and a slash at the end of the URL make no difference."""
    (peer,) = parse_peers(["vllm=http://127.0.0.1:8100/v1/"], [])
    assert ("vllm", "http://127.0.0.1:8100", Choice("base")) == (peer.name, peer.url, peer.base)
    assert ["bench-01", "bench-08", 8] == [peer.adapters[0].model, peer.adapters[-1].model, len(peer.adapters)]


def test_peer_chooses_adapters_by_field_when_they_are_numbered() -> None:
    """llama.cpp has one model; a request's field `lora` says which adapter."""
    (peer,) = parse_peers(["llama.cpp=http://h:1"], ["llama.cpp=smol,lora:0,lora:7"])
    fields = [{"lora": [{"id": number, "scale": 1.0}]} for number in (0, 7)]
    assert Endpoint("llama.cpp", "http://h:1", Choice("smol"), tuple(Choice("smol", f) for f in fields)) == peer


@pytest.mark.parametrize(
    ("peers", "models", "message"),
    [
        (["vllm"], [], "expected --peer NAME=URL"),
        (["vllm=http://h"], ["other=a,b"], "no --peer other=URL"),
        (["vllm=http://h"], ["vllm=a"], "at least one adapter"),
        (["vllm=http://h"], ["vllm=a,lora:x"], "expected a number"),
    ],
)
def test_peers_are_refused_when_they_make_no_sense(peers: list[str], models: list[str], message: str) -> None:
    """The message says what was expected."""
    with pytest.raises(ConfigurationError, match=message):
        parse_peers(peers, models)


def test_recorded_peers_have_a_target_when_looked_up() -> None:
    """Every recorded figure stands in the table."""
    keys = [f"{peer.key}-{clients}" for peer in RECORDED for clients in peer.tokens_per_second]
    assert 6 == len(keys)
    assert [] == [key for key in keys if TARGETS.get(key) is None]
