"""Reading adapters: every bad one is refused by name, a good one comes with its scaling folded in."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from adapters.adapter_files import (
    AdapterConfig,
    AdapterWeights,
    parse_adapter_weights,
    read_adapter_config,
    read_adapter_weights,
    read_weights_bytes,
)
from adapters.base_model import LoadedBase, read_module_shapes
from adapters.errors import AdapterConfigError, AdapterRejectedError, AdapterWeightsError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from tests.support.tiny import save_random_adapter

Q_PROJ = "model.layers.0.self_attn.q_proj"
A_NAME = f"base_model.model.{Q_PROJ}.lora_A.weight"
B_NAME = f"base_model.model.{Q_PROJ}.lora_B.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def shapes(tiny_folders: dict[str, Path]) -> dict[str, tuple[int, int]]:
    """The tiny model's linear layers."""
    return read_module_shapes(tiny_folders["llama"])


@pytest.fixture
def adapter(tmp_path: Path, tiny_folders: dict[str, Path]) -> Path:
    """A good adapter of rank 4 and alpha 8 on every linear layer."""
    return save_random_adapter(tmp_path / "adapter", tiny_folders["llama"], seed=0)


def _read(folder: Path, shapes: dict[str, tuple[int, int]]) -> AdapterWeights:
    return read_adapter_weights(folder, read_adapter_config(folder), shapes)


def _set_config(folder: Path, **changes: Any) -> None:
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_weights_come_with_the_scaling_folded_into_b_when_the_adapter_is_good(
    adapter: Path, shapes: dict[str, tuple[int, int]], use_rslora: bool, scaling: float
) -> None:
    """A is as stored, B is multiplied by alpha / r, or by alpha / sqrt(r) for rank-stabilised LoRA."""
    _set_config(adapter, use_rslora=use_rslora)
    stored = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    weights = _read(adapter, shapes)
    assert weights.rank == 4
    assert set(shapes) == set(weights.modules)
    for module, (a, b) in weights.modules.items():
        assert torch.equal(stored[f"base_model.model.{module}.lora_A.weight"], a)
        torch.testing.assert_close(stored[f"base_model.model.{module}.lora_B.weight"] * scaling, b)
        assert (4, shapes[module][0]) == tuple(a.shape)
        assert (shapes[module][1], 4) == tuple(b.shape)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_folded_weights_equal_what_peft_merges_when_peft_wrote_the_adapter(
    tiny_base: LoadedBase, tmp_path: Path, use_rslora: bool
) -> None:
    """B @ A is the difference that PEFT's own merge makes; every key of PEFT's config is understood."""
    layer = tiny_base.model.model.layers[0].self_attn.q_proj
    before = layer.weight.detach().clone()
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["q_proj"], task_type="CAUSAL_LM",
        init_lora_weights=False, lora_dropout=0.1,
    )  # fmt: skip
    model = get_peft_model(tiny_base.model, config)
    model.save_pretrained(tmp_path)
    weights = _read(tmp_path, read_module_shapes(tiny_base.folder))
    merged = model.merge_and_unload()
    a, b = weights.modules[Q_PROJ]
    difference = merged.model.layers[0].self_attn.q_proj.weight.detach() - before
    assert float(difference.abs().max()) > 0.01
    torch.testing.assert_close(difference, b @ a, rtol=1e-4, atol=1e-5)


PATTERNS: dict[str, dict[str, Any]] = {
    "rank": {"rank_pattern": {"q_proj": 5, "mlp.up_proj": 2}},
    "alpha": {"alpha_pattern": {"layers.1.self_attn.q_proj": 9, "up_proj": 1}},
    "both, the first matching key decides": {
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 6, "up_proj": 1},
        "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 7, "up_proj": 50},
    },
    "rank-stabilised": {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "keys that match nothing": {"rank_pattern": {"proj": 9, "^q_proj": 9}, "alpha_pattern": {"xq_proj": 9}},
}


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("case", PATTERNS)
def test_folded_weights_equal_what_peft_merges_when_modules_differ_in_rank_or_alpha(
    tiny_base: LoadedBase, tmp_path: Path, case: str
) -> None:
    """Every module's B @ A is PEFT's difference, though all are filled up to one rank."""
    before = {name: value.clone() for name, value in tiny_base.model.state_dict().items()}
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False,
        **PATTERNS[case],
    )  # fmt: skip
    model = get_peft_model(tiny_base.model, config)
    model.save_pretrained(tmp_path)
    weights = _read(tmp_path, read_module_shapes(tiny_base.folder))
    merged = model.merge_and_unload().state_dict()
    assert len(weights.modules) == 4
    for name, (a, b) in weights.modules.items():
        assert weights.rank == a.shape[0] == b.shape[1]
        difference = merged[f"{name}.weight"] - before[f"{name}.weight"]
        assert float(difference.abs().max()) > 0.01
        torch.testing.assert_close(difference, b @ a, rtol=1e-4, atol=1e-5)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "modules to save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
    "bias": ({"bias": "all"}, "bias: Input should be 'none', found 'all'"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "DoRA": ({"use_dora": True}, "use_dora=True is not supported"),
    "rank pattern expression": (
        {"rank_pattern": {"(q|k)_proj": 8}},
        r"rank_pattern: .*'\(q\|k\)_proj' is not the name",
    ),
    "rank pattern zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: Input should be greater than or equal to 1"),
    "rank pattern text": ({"rank_pattern": "q_proj"}, "rank_pattern: Input should be a valid dictionary"),
    "alpha pattern expression": ({"alpha_pattern": {".*": 8}}, r"alpha_pattern: .*'\.\*' is not the name"),
    "alpha pattern NaN": ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern: .*found nan"),
    "code to import": (
        {"auto_mapping": {"base_model_class": "X", "parent_library": "modeling_evil"}},
        "auto_mapping=.*modeling_evil.* names code to import",
    ),
    "rank as text": ({"r": "8"}, "r: Input should be a valid integer, found '8'"),
    "rank as truth": ({"r": True}, "r: Input should be a valid integer, found True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes the base model"),
    "unknown key": ({"use_magic": "yes"}, "use_magic='yes' is not supported"),
    "fan in fan out": ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
    "layer replication": ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
    "trainable tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
    "other method": ({"peft_type": "IA3"}, "peft_type: Input should be 'LORA', found 'IA3'"),
    "rank zero": ({"r": 0}, "r: Input should be greater than or equal to 1, found 0"),
    "rank huge": ({"r": 10**9}, "r: Input should be less than or equal to 4096"),
    "rank text": ({"r": "many"}, "r: .*found 'many'"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha: Input should be greater than 0"),
    "alpha not a number": ({"lora_alpha": math.nan}, "lora_alpha: .*found nan"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha: .*found inf"),
    "no targets": ({"target_modules": None}, "target_modules: "),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_is_refused_when_the_engine_does_not_compute_it(adapter: Path, case: str) -> None:
    """The key and its value stand in the message."""
    changes, message = BAD_CONFIGS[case]
    _set_config(adapter, **changes)
    with pytest.raises(AdapterConfigError, match=message):
        read_adapter_config(adapter)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "adapter_config.json is not JSON"),
        (b"", "adapter_config.json is not JSON"),
        (b"\xff\xfe\x00", "adapter_config.json is not JSON"),
        (b"[]", "must hold an object, found list"),
        (b'"LORA"', "must hold an object, found str"),
        (b"{}", "Field required"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
    ],
    ids=["cut", "empty", "binary", "list", "text", "no keys", "huge"],
)
def test_config_is_refused_when_the_file_is_no_config(adapter: Path, content: bytes, message: str) -> None:
    """What is no JSON object, or too big to be a config, is said to be so."""
    (adapter / ADAPTER_CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterConfigError, match=message):
        read_adapter_config(adapter)


def test_config_is_refused_when_it_is_missing(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json is missing"):
        read_adapter_config(tmp_path)


def test_config_is_read_when_unknown_keys_hold_neutral_values(adapter: Path) -> None:
    """A newer PEFT writes keys that we don't know; switched off they mean nothing."""
    _set_config(
        adapter, future_switch=False, future_table={}, future_list=[], future_value=None, lora_dropout=0.1,
        init_lora_weights="gaussian",
    )  # fmt: skip
    config = read_adapter_config(adapter)
    assert (config.r, config.lora_alpha, config.scaling_of("q_proj")) == (4, 8.0, 2.0)


def _transpose(tensors: Tensors) -> None:
    tensors[A_NAME], tensors[B_NAME] = tensors[A_NAME].T.contiguous(), tensors[B_NAME].T.contiguous()


def _zero_b(tensors: Tensors) -> None:
    tensors.update({name: torch.zeros_like(value) for name, value in tensors.items() if "lora_B" in name})


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing B": (lambda t: t.pop(B_NAME), f"{Q_PROJ} has no lora_B"),
    "missing A": (lambda t: t.pop(A_NAME), f"{Q_PROJ} has no lora_A"),
    "NaN": (lambda t: t[A_NAME][0, 0].fill_(math.nan), f"{Q_PROJ}: lora_A holds values that are not finite"),
    "infinite": (lambda t: t[B_NAME][-1, -1].fill_(-math.inf), f"{Q_PROJ}: lora_B holds values that are not finite"),
    "integers": (
        lambda t: t.update({A_NAME: t[A_NAME].int()}),
        rf"{re.escape(A_NAME)}' has dtype 'I32', not one of F64, F32",
    ),
    "transposed": (_transpose, rf"{Q_PROJ}: lora_A and lora_B are transposed: .* found \[64, 4\]"),
    "other rank": (lambda t: t.update({A_NAME: torch.ones(5, 64), B_NAME: torch.ones(64, 5)}), rf"{Q_PROJ}: expected"),
    "ranks differ": (lambda t: t.update({B_NAME: torch.ones(64, 5)}), r"found \[4, 64\] and \[64, 5\]"),
    "three dimensions": (lambda t: t.update({A_NAME: torch.ones(4, 64, 1)}), r"found \[4, 64, 1\]"),
    "one dimension": (lambda t: t.update({A_NAME: torch.ones(4)}), r"found \[4\] and"),
    "wrong width": (
        lambda t: t.update({A_NAME: torch.ones(4, 65)}),
        f"{Q_PROJ}: the base model's layer is 64 -> 64, the adapter's is 65 -> 64",
    ),
    "unknown module": (
        lambda t: t.update({name.replace("layers.0", "layers.9"): t.pop(name) for name in (A_NAME, B_NAME)}),
        "no linear layer 'model.layers.9.self_attn.q_proj'",
    ),
    "output head": (
        lambda t: t.update(
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64),
                "base_model.model.lm_head.lora_B.weight": torch.ones(258, 4),
            }
        ),
        "no linear layer 'lm_head'",
    ),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 258)}),
        "embed_tokens.lora_embedding_A' is not a LoRA weight of a linear layer",
    ),
    "saved module": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(258, 64)}),
        "'base_model.model.lm_head.weight' is not a LoRA weight",
    ),
    "magnitude": (
        lambda t: t.update({f"base_model.model.{Q_PROJ}.lora_magnitude_vector": torch.ones(64)}),
        "lora_magnitude_vector' is not a LoRA weight",
    ),
    "path in a name": (
        lambda t: t.update({"../../etc/passwd": torch.ones(1)}),
        "tensor '../../etc/passwd' is a path of files",
    ),
    "no effect": (_zero_b, "every product B A is zero: the adapter has no effect"),
    "no tensors": (lambda t: t.clear(), "the adapter holds no tensors"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_are_refused_when_a_tensor_is_wrong(
    adapter: Path, shapes: dict[str, tuple[int, int]], case: str
) -> None:
    """The tensor or module at fault stands in the message, with what was expected."""
    change, message = BAD_TENSORS[case]
    _change_tensors(adapter, change)
    with pytest.raises(AdapterWeightsError, match=message):
        _read(adapter, shapes)


class _Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Path.touch, (Path("pickle-was-run"),))  # type: ignore[return-value]


def test_weights_are_refused_when_a_pickle_has_a_safetensors_name(
    adapter: Path, shapes: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle is refused without being run."""
    monkeypatch.chdir(adapter)
    (adapter / ADAPTER_WEIGHTS_FILE).write_bytes(pickle.dumps(_Harmful()))
    with pytest.raises(AdapterWeightsError, match="is not a safetensors file: it is a pickle"):
        _read(adapter, shapes)
    assert not (adapter / "pickle-was-run").exists()


def test_weights_are_refused_when_only_a_pickle_is_there(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """PEFT's older format is not read."""
    (adapter / ADAPTER_WEIGHTS_FILE).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterWeightsError, match=r"adapter_model\.safetensors is missing \(other formats"):
        _read(adapter, shapes)


@pytest.mark.parametrize("num_bytes", [0, 7, 100, -1])
def test_weights_are_refused_when_the_file_is_cut(
    adapter: Path, shapes: dict[str, tuple[int, int]], num_bytes: int
) -> None:
    """A cut in the length, the header or the data is noticed."""
    path = adapter / ADAPTER_WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(AdapterWeightsError, match="is not a safetensors file"):
        _read(adapter, shapes)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, None])
def test_weights_come_in_the_asked_precision_when_stored_in_another(
    adapter: Path, shapes: dict[str, tuple[int, int]], kind: torch.dtype | None
) -> None:
    """Any floating-point type is read, also several in one file (None); the scaling is folded in before the cast."""
    kinds = [torch.float32, torch.bfloat16, torch.float64]
    _change_tensors(
        adapter, lambda t: t.update({n: v.to(kind or kinds[index % 3]) for index, (n, v) in enumerate(t.items())})
    )
    stored = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    config = read_adapter_config(adapter)
    content = read_weights_bytes(adapter, config, shapes)
    before = bytes(content)

    weights = parse_adapter_weights(content, config, shapes, dtype=torch.bfloat16)

    assert before == content
    for module, (a, b) in weights.modules.items():
        assert torch.equal(stored[f"base_model.model.{module}.lora_A.weight"].float().bfloat16(), a)
        expected = stored[f"base_model.model.{module}.lora_B.weight"].float() * 2
        assert torch.equal(expected.bfloat16(), b)
    assert weights.num_bytes == 2 * sum(value.numel() for value in stored.values())


def test_weights_are_read_when_the_header_has_an_odd_length(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Numbers at addresses that are no multiples of their size are read all the same."""
    expected = _read(adapter, shapes)
    path = adapter / ADAPTER_WEIGHTS_FILE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    for module, (a, b) in _read(adapter, shapes).modules.items():
        assert torch.equal(expected.modules[module][0], a)
        assert torch.equal(expected.modules[module][1], b)


def test_weights_are_refused_when_the_cast_overflows(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """A number that float32 holds and float16 does not is no infinity on the device."""
    _change_tensors(adapter, lambda t: t[B_NAME][0, 0].fill_(1e5))
    config = read_adapter_config(adapter)
    content = read_weights_bytes(adapter, config, shapes)
    with pytest.raises(AdapterWeightsError, match=rf"{Q_PROJ}: lora_B overflows torch\.float16, the base"):
        parse_adapter_weights(content, config, shapes, dtype=torch.float16)


def test_weights_are_refused_when_a_and_b_never_meet(adapter: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Neither A nor B is zero, but each rank has a zero side, and so has every product."""

    def split(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "lora_A" in name:
                tensor[1:] = 0
            else:
                tensor[:, 0] = 0

    _change_tensors(adapter, split)
    with pytest.raises(AdapterWeightsError, match="every product B A is zero"):
        _read(adapter, shapes)


def test_weights_are_read_without_a_base_when_no_shapes_are_given(adapter: Path) -> None:
    """Everything but the base model's layers is still checked."""
    config = read_adapter_config(adapter)
    _change_tensors(adapter, lambda t: t.update({A_NAME: torch.ones(4, 65)}))
    assert tuple(read_adapter_weights(adapter, config).modules[Q_PROJ][0].shape) == (4, 65)
    _change_tensors(adapter, lambda t: t[A_NAME].fill_(math.nan))
    with pytest.raises(AdapterWeightsError, match="not finite"):
        read_adapter_weights(adapter, config)


def test_rejections_have_one_parent_when_caught_together() -> None:
    """A caller can catch every rejected adapter with one class."""
    assert issubclass(AdapterConfigError, AdapterRejectedError)
    assert issubclass(AdapterWeightsError, AdapterRejectedError)


@pytest.mark.parametrize(("rank", "alpha", "rslora", "scaling"), [(16, 32, False, 2.0), (16, 32, True, 8.0)])
def test_scaling_follows_the_papers_when_computed(rank: int, alpha: float, rslora: bool, scaling: float) -> None:
    """Worked by hand: 32 / 16, and 32 / sqrt(16)."""
    config = AdapterConfig(peft_type="LORA", r=rank, lora_alpha=alpha, target_modules=["q_proj"], use_rslora=rslora)
    assert scaling == config.scaling_of(Q_PROJ)
