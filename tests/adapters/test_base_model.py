"""Loading the base model: one function, one identity."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from adapters.base_files import compute_fingerprint
from adapters.base_model import LoadedBase, linear_shapes, load_base, load_tokenizer, pick_device, read_module_shapes
from adapters.errors import BaseModelError, ConfigurationError
from tests.support.tiny import FAMILIES, load_tiny_base, tiny_settings


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny base model that a test may change."""
    return shutil.copytree(tiny_folders["llama"], tmp_path / "base", ignore=shutil.ignore_patterns(".*", "home"))


def test_load_base_keeps_the_weights_when_not_quantised(tiny_base: LoadedBase, tiny_folders: dict[str, Path]) -> None:
    """Float32 as stored, in eval mode, on the CPU."""
    assert {torch.float32} == {parameter.dtype for parameter in tiny_base.model.parameters()}
    assert not tiny_base.model.training
    assert torch.device("cpu") == tiny_base.device == tiny_base.model.device
    assert tiny_folders["llama"] == tiny_base.folder
    assert ("llama", "none") == (tiny_base.reference.name, tiny_base.reference.quantisation)
    assert tiny_base.tokenizer.eos_token_id is not None


def test_load_base_gives_nf4_with_double_quantisation_when_asked(folder: Path) -> None:
    """Every linear layer of the decoder is 4-bit with bfloat16 arithmetic; embedding and head are not."""
    model = load_tiny_base(folder, quantisation="nf4").model
    names = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert set(read_module_shapes(folder)) == names
    for name in names:
        layer = model.get_submodule(name)
        assert torch.bfloat16 == layer.compute_dtype
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
    assert torch.bfloat16 == model.model.embed_tokens.weight.dtype
    assert torch.bfloat16 == model.lm_head.weight.dtype


def test_load_base_gives_equal_fingerprints_when_loaded_twice(folder: Path) -> None:
    """Trainer and server come to the same identity, which is that of the files; the quantisation is part of it."""
    first, second = load_tiny_base(folder), load_tiny_base(folder)
    assert first.reference == second.reference
    assert compute_fingerprint(folder, quantisation="none") == first.reference.fingerprint
    four_bit = load_tiny_base(folder, quantisation="nf4").reference
    assert four_bit == load_tiny_base(folder, quantisation="nf4").reference
    assert compute_fingerprint(folder, quantisation="nf4") == four_bit.fingerprint != first.reference.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_module_shapes_equal_the_loaded_models_when_read_from_the_config(
    tiny_folders: dict[str, Path], family: str
) -> None:
    """No weight is read, for every family; the head is not among them."""
    shapes = read_module_shapes(tiny_folders[family])
    assert linear_shapes(load_tiny_base(tiny_folders[family]).model) == shapes
    fused = {"phi3": 3, "glm4": 1}.get(family, 0)  # of seven linear layers that are parts of one with another
    assert len(shapes) == 2 * (7 - fused)
    assert shapes["model.layers.1.mlp.down_proj"] == (128, 64)
    assert not any("lm_head" in name for name in shapes)


def test_module_shapes_are_unquantised_when_the_model_is_in_4_bits(folder: Path) -> None:
    """A packed weight doesn't hide the layer's width."""
    assert read_module_shapes(folder) == linear_shapes(load_tiny_base(folder, quantisation="nf4").model)


def test_load_base_refuses_when_the_folder_is_missing(tmp_path: Path) -> None:
    """The folder is named, and no hub is asked."""
    with pytest.raises(BaseModelError, match="none' does not exist"):
        load_base(tiny_settings(tmp_path / "none", home=tmp_path))


def test_load_base_refuses_when_the_architecture_is_unknown(folder: Path) -> None:
    """The folder and the library's reason stand in the message."""
    (folder / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(BaseModelError, match=f"the base model in {folder} can't be loaded: .*nothing"):
        load_base(tiny_settings(folder))


def test_load_tokenizer_refuses_when_there_is_no_chat_template(folder: Path) -> None:
    """A base model that was never taught to chat can't be served."""
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match=f"tokenizer in {folder} has no chat template"):
        load_tokenizer(folder)


def test_load_tokenizer_refuses_when_there_is_none(tmp_path: Path) -> None:
    """The folder is named."""
    with pytest.raises(BaseModelError, match=f"{tmp_path} holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_pick_device_gives_the_device_when_it_is_there() -> None:
    """`auto` is CUDA if present."""
    assert torch.device("cpu") == pick_device("cpu")
    assert torch.device("cuda" if torch.cuda.is_available() else "cpu") == pick_device("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_pick_device_refuses_when_there_is_no_cuda(device: str) -> None:
    """No silent fall back to the CPU."""
    with pytest.raises(ConfigurationError, match=f"device '{device}' was asked for"):
        pick_device(device)


def test_advice_to_fetch_kernels_is_not_logged_when_bitsandbytes_gives_it(caplog: pytest.LogCaptureFixture) -> None:
    """That one line alone: whatever else it warns of is passed on."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please ...", "No module")
    logger.warning("something else")
    assert ["something else"] == [record.getMessage() for record in caplog.records]
