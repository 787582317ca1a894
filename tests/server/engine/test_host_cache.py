"""The host cache: least recently used leave first, and never more bytes than the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.adapter_files import AdapterWeights
from server.engine.host_cache import HostCache


def _weights(num_floats: int) -> AdapterWeights:
    return AdapterWeights(1, {"layer": (torch.zeros(1, num_floats - 1), torch.zeros(1, 1))})


def test_put_drops_the_least_recently_used_when_the_budget_is_spent() -> None:
    """Reading an entry counts as use; what leaves is what nobody looked at."""
    cache = HostCache(max_bytes=30 * 4)
    for name in "abc":
        assert cache.put(name, _weights(10))
    assert cache.get("a") is not None

    assert cache.put("d", _weights(15))

    assert ["a", "d"] == cache.digests
    assert 25 * 4 == cache.num_bytes
    assert cache.get("b") is None
    assert ("a" in cache, "c" in cache, len(cache)) == (True, False, 2)


def test_put_keeps_the_others_when_an_entry_is_larger_than_the_budget() -> None:
    """Nothing is dropped for what could not stay anyhow."""
    cache = HostCache(max_bytes=40)
    cache.put("a", _weights(10))
    assert not cache.put("b", _weights(11))
    assert ["a"] == cache.digests


def test_put_counts_an_entry_once_when_it_is_put_again() -> None:
    """The later weights replace the earlier ones, also when they are too large to stay."""
    cache = HostCache(max_bytes=80)
    cache.put("a", _weights(10))
    cache.put("a", _weights(12))
    assert 48 == cache.num_bytes
    assert not cache.put("a", _weights(21))
    assert (0, []) == (cache.num_bytes, cache.digests)


@pytest.mark.parametrize("name", ["a", "unknown"])
def test_discard_frees_the_bytes_when_the_entry_is_there(name: str) -> None:
    """An unknown name is no error: it may have been dropped before."""
    cache = HostCache(max_bytes=80)
    cache.put("a", _weights(10))
    cache.discard(name)
    assert (0 if name == "a" else 40) == cache.num_bytes


def test_cache_holds_nothing_when_the_budget_is_zero() -> None:
    """Zero switches it off."""
    cache = HostCache(max_bytes=0)
    assert not cache.put("a", _weights(1))
    assert cache.get("a") is None


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "discard"]), st.sampled_from("abcdef"), st.integers(1, 12))))
def test_cache_behaves_like_a_list_when_used_in_any_order(actions: list[tuple[str, str, int]]) -> None:
    """Compared with a plain list from least to most recently used."""
    cache, expected = HostCache(max_bytes=20 * 4), list[tuple[str, int]]()
    for action, name, size in actions:
        former = next((entry for entry in expected if entry[0] == name), None)
        if former is not None:
            expected.remove(former)
        if action == "put":
            cache.put(name, _weights(size))
            expected.append((name, size))
            while sum(entry[1] for entry in expected) > 20:
                expected.pop(0)
        elif action == "get":
            assert (former is not None) == (cache.get(name) is not None)
            expected += [former] if former is not None else []
        else:
            cache.discard(name)
        assert [entry[0] for entry in expected] == cache.digests
        assert 4 * sum(entry[1] for entry in expected) == cache.num_bytes <= cache.max_bytes
