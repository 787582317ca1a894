"""Stacked adapters: what a slot computes, that clearing restores the base, that a failed load changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters.adapter_files import AdapterWeights
from adapters.errors import AdapterRejectedError, AdapterWeightsError, RankTooHighError
from server.engine.lora import AdapterSlots, Segment, SlottedLinear
from tests.support.engine import RECIPES, Bench, slotted_layers
from tests.support.tiny import load_tiny_base

FIRST, SECOND, *_ = RECIPES
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def bench(own_bench: Callable[..., Bench], request: pytest.FixtureRequest) -> Bench:
    """A bench whose tensors a test may harm."""
    return own_bench(num_slots=3, max_batch=2, native=request.param)


@pytest.fixture(scope="module")
def plain_model(tiny_folders: dict[str, Path]) -> Any:
    """The same base model, untouched."""
    return load_tiny_base(tiny_folders["llama"]).model


def _snapshot(bench: Bench) -> dict[str, torch.Tensor]:
    """Every parameter and every slot's tensors, and what the frozen layers compute."""
    tensors = {name: value.clone() for name, value in bench.base.model.state_dict().items()}
    for name, layer in slotted_layers(bench.base.model).items():
        for slot in range(1, bench.runner.slots.num_slots + 1):
            a, b = layer.slot_weights(slot)
            tensors[f"{name}.{slot}.a"], tensors[f"{name}.{slot}.b"] = a.clone(), b.clone()
        tensors[f"{name}.base"] = _apply(bench, layer, torch.ones(1, 1, layer.in_features), [0])
    return tensors


def _assert_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def _apply(
    bench: Bench, layer: SlottedLinear, x: torch.Tensor, decode_slots: list[int], *segments: Segment
) -> torch.Tensor:
    bench.runner.slots.select(decode_slots, segments)
    with torch.inference_mode():
        y: torch.Tensor = layer(x)
    return y


@pytest.mark.parametrize("as_prompt", [False, True], ids=["decodes", "prompt"])
@pytest.mark.parametrize("digest", RECIPES)
def test_slot_computes_w_plus_scaled_b_a_when_an_adapter_is_loaded(
    digest: str, as_prompt: bool, bench: Bench, plain_model: Any
) -> None:
    """Each layer's output is (W + (alpha / r) B A) x, with the tensors as the file holds them."""
    recipe = RECIPES[digest]
    tensors = load_file(bench.adapters[digest] / "adapter_model.safetensors")
    bench.runner.slots.load(bench.read(digest), slot=2)
    generator = torch.Generator().manual_seed(5)

    for name, layer in slotted_layers(bench.base.model).items():
        plain = plain_model.get_submodule(name)
        weight = plain.weight.double()
        if (key := f"base_model.model.{name}.lora_A.weight") in tensors:
            b = tensors[key.replace("lora_A", "lora_B")]
            weight = weight + recipe.alpha / recipe.rank * b.double() @ tensors[key].double()
        x = torch.randn(1, 5, layer.in_features, generator=generator)
        expected = x.double() @ weight.T + (0 if plain.bias is None else plain.bias)
        found = _apply(bench, layer, x, [], Segment(0, 5, 2)) if as_prompt else _apply(bench, layer, x, [2] * 5)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_slots_compute_each_tokens_own_adapter_when_decodes_and_prompts_are_mixed(bench: Bench) -> None:
    """In one row of tokens, each gets the product of its own slot and no other."""
    slots = bench.runner.slots
    for slot, digest in enumerate(list(RECIPES)[:3], start=1):
        slots.load(bench.read(digest), slot=slot)
    decodes, segments = [2, 0, 1, 3], [Segment(4, 6, 3), Segment(6, 7, 0), Segment(7, 9, 1)]
    token_slots = [*decodes, 3, 3, 0, 1, 1]
    for layer in slotted_layers(bench.base.model).values():
        x = torch.randn(1, len(token_slots), layer.in_features, generator=torch.Generator().manual_seed(1))
        alone = torch.cat([_apply(bench, layer, x[:, i : i + 1], [slot]) for i, slot in enumerate(token_slots)], dim=1)
        torch.testing.assert_close(_apply(bench, layer, x, decodes, *segments), alone, rtol=1e-5, atol=1e-5)


def test_tokens_are_computed_bit_for_bit_as_alone_when_the_kernel_is_native(own_bench: Callable[..., Bench]) -> None:
    """Each token's update is added up by itself, so that no neighbour can change a bit of it."""
    bench = own_bench(num_slots=3, max_batch=2)
    first, _, *others = RECIPES
    for slot, digest in enumerate([first, *others], start=1):
        bench.runner.slots.load(bench.read(digest), slot=slot)
    layer = slotted_layers(bench.base.model)["model.layers.0.mlp.up_proj"]
    x, zero = torch.randn(4, layer.in_features), torch.zeros(1)
    slots = [2, 3, 1, 2]
    y = torch.randn(4, layer.group.ends[-1])
    together = y.clone()
    layer.group._update_natively(together, x, torch.tensor(slots, dtype=torch.int32))
    for index, slot in enumerate(slots):
        alone = y[index : index + 1].clone()
        layer.group._update_natively(alone, x[index : index + 1], torch.tensor([slot], dtype=torch.int32))
        assert torch.equal(alone[0], together[index])
        assert (alone - y[index]).abs().max() > zero


def test_base_tokens_are_computed_bit_for_bit_when_other_tokens_have_adapters(bench: Bench) -> None:
    """A base request is exact in a mixed batch too: what it adds is zero."""
    bench.runner.slots.load(bench.read(FIRST), slot=1)
    layer = slotted_layers(bench.base.model)[LAYER]
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(1))
    base = _apply(bench, layer, x, [0] * 4)

    mixed = _apply(bench, layer, x, [1, 0, 0, 1])

    assert torch.equal(base[:, 1:3], mixed[:, 1:3])
    assert not torch.equal(base[:, 0], mixed[:, 0])


def test_group_is_right_when_its_members_are_asked_in_any_order_or_twice(bench: Bench, plain_model: Any) -> None:
    """Layers are computed together for one input, but nobody has to ask for all of them, or with the same input."""
    layers = slotted_layers(bench.base.model)
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert 1 == len({id(layers[name].group) for name in names})
    x, y = (torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for name, given in [(names[1], x), (names[1], x), (names[0], y), (names[2], x), (names[0], x), (names[2], y)]:
        found = _apply(bench, layers[name], given, [0, 0])
        torch.testing.assert_close(found, plain_model.get_submodule(name)(given), rtol=1e-5, atol=1e-5)


def test_clear_restores_the_base_bit_for_bit_when_a_slot_was_loaded(bench: Bench) -> None:
    """Load, then clear: every tensor of the model is as before."""
    before = _snapshot(bench)
    bench.runner.slots.load(bench.read(FIRST), slot=3)
    assert not torch.equal(before[f"{LAYER}.3.a"], _snapshot(bench)[f"{LAYER}.3.a"])

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
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
    expected = _apply(bench, layer, x, [1, 2, 0])
    layer.slot_weights(2)[0].fill_(float("inf"))

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
    x = torch.randn(1, 3, layer.in_features)
    expected = _apply(bench, layer, x, [0, 0, 0])
    for slot in (1, 2, 3):
        for tensor in layer.slot_weights(slot):
            tensor.fill_(float("nan"))
    assert torch.equal(expected, _apply(bench, layer, x, [0], Segment(1, 3, 0)))


def test_slots_wrap_only_linear_layers_of_the_decoder_when_others_are_there() -> None:
    """Layers outside the decoder stay what they were."""
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(3, 2)]), "head": torch.nn.Linear(3, 2)})
    whole = torch.nn.ModuleDict({"model": model})

    slots = AdapterSlots(whole, num_slots=1, max_rank=2, dtype=torch.float32)

    assert slots.module_shapes == {"model.layers.0": (3, 2)}
    assert type(model["head"]) is torch.nn.Linear


def test_num_bytes_is_what_the_files_hold_when_every_slot_is_full(bench: Bench) -> None:
    """No padding between slots: three slots of rank 8 for all layers, in float32."""
    per_rank = sum(num_in + num_out for num_in, num_out in bench.runner.slots.module_shapes.values())
    assert 3 * 8 * per_rank * 4 == bench.runner.slots.num_bytes
