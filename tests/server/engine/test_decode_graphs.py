"""Decode steps of fixed shapes: padding changes no answer, and nothing in a step would hinder its capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine.decode_graphs import DecodeGraphs, DecodeToken
from tests.support.engine import RECIPES, Bench, ask, make_bench, run_to_end
from tests.support.tiny import FAMILIES

# What a captured step must not do: hand a tensor's value to Python, choose shapes by it, or bring numbers from Python.
# Tensor.tolist() shows as resolve_conj, torch.tensor() as lift_fresh, int() and bool() as item and is_nonzero.
_READS = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense", "aten::resolve_conj", "aten::equal"}
_FORBIDDEN = _READS | {"aten::nonzero", "aten::masked_select", "aten::lift_fresh"}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Takes down the names of a step's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.names.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def captured(tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]) -> Bench:
    """A tiny Llama that decodes in steps of fixed shapes: 1, 2, 4 or 5 rows."""
    return make_bench(tiny_folders["llama"], adapter_folders["llama"], max_batch=5, native=False, captured=True)


def _graphs(bench: Bench) -> DecodeGraphs:
    graphs = bench.runner._graphs
    assert graphs is not None
    return graphs


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_hands_no_value_to_python_when_it_is_computed(
    family: str, slot: int, tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]
) -> None:
    """A CUDA graph holds what the device does; what Python decides meanwhile would be decided for ever."""
    bench = make_bench(tiny_folders[family], adapter_folders[family], native=False, captured=True)
    graphs = _graphs(bench)
    tokens = [DecodeToken(5, 0, [1], row=0, slot=slot)]
    with torch.inference_mode():
        graphs.run(tokens)
        step = next(replay for shape, replay in graphs._replays.items() if shape.has_adapters == bool(slot))
        with _Recorder() as recorder:
            step()
    assert "aten::embedding" in recorder.names
    assert _FORBIDDEN.isdisjoint(recorder.names)


def test_decode_steps_are_those_of_fixed_shapes_when_no_prompt_is_read(
    captured: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an answer of eight tokens the first comes with the prompt, the others from such steps."""
    graphs, counts = _graphs(captured), list[int]()
    run = graphs.run

    def run_counted(tokens: Sequence[DecodeToken]) -> torch.Tensor:
        counts.append(len(tokens))
        return run(tokens)

    monkeypatch.setattr(graphs, "run", run_counted)
    answers = run_to_end(captured.engine(), ask("a", "hello", max_tokens=8), ask("b", "hello", max_tokens=8))
    num_tokens = [len(answer.tokens) for answer in answers.values()]
    assert [2] * (min(num_tokens) - 1) == counts[: min(num_tokens) - 1]


def test_answers_are_those_of_plain_steps_when_requests_grow_into_the_next_shape(
    tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]
) -> None:
    """The base model in front of adapters, and contexts that pass 128 tokens, where the smallest shape ends."""
    folders = tiny_folders["llama"], adapter_folders["llama"]
    requests = [
        ask(f"r{index}", "x" * (100 + 9 * index), digest, max_tokens=40, ignore_eos=True)
        for index, digest in enumerate([None, *RECIPES])
    ]
    plain, captured = (
        run_to_end(make_bench(*folders, max_context=300, native=False, captured=captured).engine(), *requests)
        for captured in (False, True)
    )
    assert plain == captured
    assert [40] * len(requests) == [len(answer.tokens) for answer in captured.values()]


def test_other_blocks_stay_as_they_are_when_rows_are_padded(captured: Bench) -> None:
    """Three requests are padded to four rows: the fourth writes to the spare block, and to no other."""
    cache = captured.runner.cache
    tokens = [DecodeToken(5 + row, 0, [2 * row], row=row, slot=0) for row in range(3)]
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(7)
    with torch.inference_mode():
        logits = _graphs(captured).run(tokens)
    assert 3 == len(logits)
    untouched = [block for block in range(cache.num_blocks) if block not in (0, 2, 4)]
    for tensor in (*cache.keys, *cache.values):
        assert bool((tensor[untouched] == 7).all())
        assert bool((tensor[cache.spare_block] != 7).any())


def test_answers_are_the_same_when_the_spare_block_holds_garbage(captured: Bench) -> None:
    """What rows without a request compute, even NaN, stays theirs."""
    requests = [ask(f"r{index}", "hello", digest, max_tokens=6) for index, digest in enumerate([None, *RECIPES][:3])]
    expected = run_to_end(captured.engine(), *requests)
    cache = captured.runner.cache
    for tensor in (*cache.keys, *cache.values):
        tensor[cache.spare_block] = float("nan")
    assert expected == run_to_end(captured.engine(), *requests)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_captured_step_gives_the_tokens_of_a_plain_one_when_there_is_cuda(
    quantisation: str, tiny_folders: dict[str, Path], adapter_folders: dict[str, dict[str, Path]]
) -> None:
    """The graphs themselves, replayed on the device, against steps of any shape there."""
    requests = [ask(f"r{index}", "once upon", digest, max_tokens=12) for index, digest in enumerate([None, *RECIPES])]
    folders = tiny_folders["llama"], adapter_folders["llama"]
    plain, captured = (
        make_bench(*folders, quantisation=quantisation, device="cuda", captured=captured) for captured in (False, True)
    )
    assert run_to_end(plain.engine(), *requests) == run_to_end(captured.engine(), *requests)
