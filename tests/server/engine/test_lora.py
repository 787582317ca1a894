"""Stacked adapters: what a slot computes, that clearing restores the base, that a failed load changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterRejectedError, AdapterWeightsError, RankTooHighError
from server.engine.lora import AdapterSlots, SlottedLinear
from tests.support.engine import RECIPES, Bench, slotted_layers

FIRST, SECOND, *_ = RECIPES
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def bench(own_bench: Callable[..., Bench]) -> Bench:
    """A bench whose tensors a test may harm."""
    return own_bench(num_slots=3, max_batch=2)


def _snapshot(bench: Bench) -> dict[str, torch.Tensor]:
    """Every parameter and every slot's tensors."""
    tensors = {name: value.clone() for name, value in bench.base.model.state_dict().items()}
    for name, layer in slotted_layers(bench.base.model).items():
        tensors[f"{name}.a"], tensors[f"{name}.b"] = layer.stacked_a.clone(), layer.stacked_b.clone()
    return tensors


def _assert_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def _apply(bench: Bench, layer: SlottedLinear, x: torch.Tensor, token_slots: list[int]) -> torch.Tensor:
    bench.runner.slots.select(token_slots)
    with torch.inference_mode():
        y: torch.Tensor = layer(x)
    return y


@pytest.mark.parametrize("digest", RECIPES)
def test_slot_computes_w_plus_scaled_b_a_when_an_adapter_is_loaded(digest: str, bench: Bench) -> None:
    """Each layer's output is (W + (alpha / r) B A) x, with the tensors as the file holds them."""
    recipe = RECIPES[digest]
    from safetensors.torch import load_file

    tensors = load_file(bench.adapters[digest] / "adapter_model.safetensors")
    bench.runner.slots.load(bench.read(digest), slot=2)
    generator = torch.Generator().manual_seed(5)

    for name, layer in slotted_layers(bench.base.model).items():
        weight = layer.base.weight.double()
        if (key := f"base_model.model.{name}.lora_A.weight") in tensors:
            b = tensors[key.replace("lora_A", "lora_B")]
            weight = weight + recipe.alpha / recipe.rank * b.double() @ tensors[key].double()
        x = torch.randn(1, 5, layer.base.in_features, generator=generator)
        bias = 0 if layer.base.bias is None else layer.base.bias
        expected = x.double() @ weight.T + bias
        torch.testing.assert_close(_apply(bench, layer, x, [2] * 5), expected.float(), rtol=1e-4, atol=1e-4)


def test_slots_compute_each_tokens_own_adapter_when_tokens_are_mixed(bench: Bench) -> None:
    """In one row of tokens, each gets the product of its own slot and no other."""
    slots = bench.runner.slots
    for slot, digest in enumerate(list(RECIPES)[:3], start=1):
        slots.load(bench.read(digest), slot=slot)
    token_slots = [2, 0, 1, 3, 3, 0, 1]
    for layer in slotted_layers(bench.base.model).values():
        x = torch.randn(1, len(token_slots), layer.base.in_features, generator=torch.Generator().manual_seed(1))
        alone = torch.cat([_apply(bench, layer, x[:, i : i + 1], [slot]) for i, slot in enumerate(token_slots)], dim=1)
        torch.testing.assert_close(_apply(bench, layer, x, token_slots), alone, rtol=1e-5, atol=1e-5)


def test_base_tokens_are_computed_bit_for_bit_when_other_tokens_have_adapters(bench: Bench) -> None:
    """A base request is exact in a mixed batch too: what it adds is zero."""
    bench.runner.slots.load(bench.read(FIRST), slot=1)
    layer = slotted_layers(bench.base.model)[LAYER]
    x = torch.randn(1, 4, layer.base.in_features, generator=torch.Generator().manual_seed(1))

    mixed = _apply(bench, layer, x, [1, 0, 0, 1])

    assert torch.equal(layer.base(x)[:, 1:3], mixed[:, 1:3])
    assert not torch.equal(layer.base(x)[:, 0], mixed[:, 0])


def test_clear_restores_the_base_bit_for_bit_when_a_slot_was_loaded(bench: Bench) -> None:
    """Load, then clear: every tensor of the model is as before."""
    before = _snapshot(bench)
    bench.runner.slots.load(bench.read(FIRST), slot=3)
    assert not torch.equal(before[f"{LAYER}.a"], _snapshot(bench)[f"{LAYER}.a"])

    bench.runner.slots.clear(3)

    _assert_equal(before, _snapshot(bench))


def test_load_leaves_nothing_of_the_former_adapter_when_the_new_one_is_smaller(bench: Bench) -> None:
    """A rank-2 adapter for two modules over a rank-4 one for all is the same as into an empty slot."""
    bench.runner.slots.load(bench.read(SECOND), slot=1)
    expected = _snapshot(bench)
    bench.runner.slots.load(bench.read(FIRST), slot=1)

    bench.runner.slots.load(bench.read(SECOND), slot=1)

    _assert_equal(expected, _snapshot(bench))


def test_load_leaves_other_slots_alone_when_they_are_in_use(bench: Bench) -> None:
    """The rows of slot 1 and 3 don't change while slot 2 is written and cleared."""
    bench.runner.slots.load(bench.read(FIRST), slot=1)
    bench.runner.slots.load(bench.read(SECOND), slot=3)
    before = _snapshot(bench)

    bench.runner.slots.load(bench.read(list(RECIPES)[2]), slot=2)
    bench.runner.slots.clear(2)

    _assert_equal(before, _snapshot(bench))


def _weights(rank: int, *modules: tuple[str, tuple[int, int], tuple[int, int]]) -> AdapterWeights:
    return AdapterWeights(rank, {name: (torch.ones(a), torch.ones(b)) for name, a, b in modules})


GOOD = (LAYER, (4, 64), (64, 4))
BROKEN: dict[str, tuple[AdapterWeights, type[AdapterRejectedError], str]] = {
    "rank too high": (_weights(9, (LAYER, (9, 64), (64, 9))), RankTooHighError, "rank 9.*rank 8"),
    "unknown module": (_weights(4, GOOD, ("model.layers.7.x", (4, 64), (64, 4))), AdapterWeightsError, "layers.7.x"),
    "wrong inputs": (
        _weights(4, GOOD, ("model.layers.1.self_attn.q_proj", (4, 32), (64, 4))),
        AdapterWeightsError,
        "layers.1.self_attn.q_proj",
    ),
    "wrong outputs": (
        _weights(4, GOOD, ("model.layers.1.mlp.up_proj", (4, 64), (64, 4))),
        AdapterWeightsError,
        "layers.1.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_load_leaves_every_tensor_as_it_was_when_the_adapter_is_wrong(kind: str, bench: Bench) -> None:
    """The good module in front of the bad one is not written either, and the slot's former adapter stays."""
    weights, error, message = BROKEN[kind]
    bench.runner.slots.load(bench.read(FIRST), slot=1)
    before = _snapshot(bench)

    with pytest.raises(error, match=message):
        bench.runner.slots.load(weights, slot=1)

    _assert_equal(before, _snapshot(bench))


def test_infinite_product_stays_with_its_own_tokens_when_another_slots_a_is_infinite(bench: Bench) -> None:
    """What another adapter's A makes of a token is dropped, not multiplied by zero."""
    layer = slotted_layers(bench.base.model)[LAYER]
    bench.runner.slots.load(bench.read(FIRST), slot=1)
    bench.runner.slots.load(bench.read(FIRST), slot=2)
    x = torch.randn(1, 3, layer.base.in_features, generator=torch.Generator().manual_seed(1))
    expected = _apply(bench, layer, x, [1, 2, 0])
    layer.stacked_a[8:16] = float("inf")

    found = _apply(bench, layer, x, [1, 2, 0])

    assert torch.equal(expected[:, [0, 2]], found[:, [0, 2]])
    assert not found[:, 1].isfinite().any()


def test_module_shapes_name_every_linear_layer_of_the_decoder_when_asked(bench: Bench) -> None:
    """What an adapter may target: the seven projections of both layers, not the output head."""
    shapes = bench.runner.slots.module_shapes
    assert len(shapes) == 14
    assert shapes["model.layers.1.mlp.up_proj"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj"] == (64, 32)
    assert "lm_head" not in shapes


@pytest.mark.parametrize("slot", [0, 4])
def test_load_refuses_a_slot_when_it_is_the_bases_or_beyond_the_last(slot: int, bench: Bench) -> None:
    """Slot 0 has no columns that could be written."""
    before = _snapshot(bench)
    with pytest.raises(AssertionError, match=f"slot {slot} of 3"):
        bench.runner.slots.load(bench.read(FIRST), slot=slot)
    _assert_equal(before, _snapshot(bench))


def test_selection_skips_the_adapters_when_every_token_is_the_bases(bench: Bench) -> None:
    """A batch of base requests alone is the base layer's very output, whatever the slots hold."""
    layer = slotted_layers(bench.base.model)[LAYER]
    layer.stacked_a[:] = float("nan")
    layer.stacked_b[:] = float("nan")
    x = torch.randn(1, 3, layer.base.in_features)
    assert torch.equal(layer.base(x), _apply(bench, layer, x, [0, 0, 0]))


def test_slots_wrap_only_once_when_a_linear_layer_is_found() -> None:
    """Layers outside the decoder stay what they were."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 2)]), "head": torch.nn.Linear(3, 2)})
    whole = torch.nn.ModuleDict({"model": model})

    slots = AdapterSlots(whole, num_slots=1, max_rank=2, dtype=torch.float32)

    assert slots.module_shapes == {"model.layers.0": (3, 2)}
    assert type(model["head"]) is torch.nn.Linear
