"""The options of an adapter: what they begin as, and that what is served is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_model import load_base
from adapters.errors import ConfigurationError
from tests.support.methods import make_run, method_settings
from tests.support.tiny import load_tiny_base, tiny_settings
from training.config import TrainSettings
from training.lora import add_adapter
from training.methods import METHODS
from training.methods.run import common_arguments


def _settings(tmp_path: Path, **changes: Any) -> TrainSettings:
    return TrainSettings.load(tmp_path / "home", **({"rank": 4, "alpha": 8} | changes))


@pytest.mark.parametrize(
    "changes", [{"rslora": True, "rank": 9}, {"init": "gaussian"}, {"targets": ("q_proj", "mlp.up_proj")}]
)
def test_served_update_is_the_trained_one_when_an_option_is_used(
    tmp_path: Path, tiny_folders: dict[str, Path], changes: dict[str, Any]
) -> None:
    """What the server's reader makes of the saved files is the change of every layer that PEFT trained."""
    base = load_tiny_base(tiny_folders["llama"])
    run = make_run(base, method_settings(tmp_path / "home", "sft", max_steps=2, **changes), tmp_path)
    METHODS["sft"](run)
    run.model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)

    served = read_adapter_weights(tmp_path / "saved", read_adapter_config(tmp_path / "saved")).modules

    layers = {
        name.removeprefix("base_model.model."): m for name, m in run.model.named_modules() if hasattr(m, "lora_A")
    }
    assert served.keys() == layers.keys()
    for name, (a, b) in served.items():
        trained = layers[name].get_delta_weight("default").detach()
        torch.testing.assert_close(b @ a, trained, rtol=1e-5, atol=1e-6)
        assert trained.abs().max() > 0


def test_targets_get_adapters_alone_when_they_are_named(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """By the end of the path, in every layer."""
    model = add_adapter(load_tiny_base(tiny_folders["llama"]), _settings(tmp_path, targets=("q_proj", "mlp.up_proj")))

    ends = {
        name.split(".lora_")[0].rsplit(".", 2)[1] + "." + name.split(".lora_")[0].rsplit(".", 1)[1]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert ends == {"self_attn.q_proj", "mlp.up_proj"}


@pytest.mark.parametrize("target", ["query", "lm_head", "proj", "model"])
def test_targets_are_refused_with_those_there_are_when_one_is_unknown(
    tmp_path: Path, tiny_folders: dict[str, Path], target: str
) -> None:
    """The output head is no layer of the decoder: the engine has no slot for it."""
    expected = rf"no linear layer '{target}' .*it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"

    with pytest.raises(ConfigurationError, match=expected):
        add_adapter(load_tiny_base(tiny_folders["llama"]), _settings(tmp_path, targets=("q_proj", target)))


def test_loftq_takes_off_a_part_of_the_error_when_it_begins(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """With the adapter the layers are nearer to the stored weights, and the 4-bit weights are what they were."""
    stored = load_base(tiny_settings(tiny_folders["llama"])).model.get_parameter("model.layers.0.mlp.up_proj.weight")
    base = load_tiny_base(tiny_folders["llama"], quantisation="nf4")
    quantised = base.model.get_submodule("model.layers.0.mlp.up_proj").weight
    before = quantised.data.clone()

    model = add_adapter(base, _settings(tmp_path, init="loftq", rank=8, alpha=4, rslora=True))

    error = stored.detach().float() - dequantize_4bit(quantised.data, quantised.quant_state).float()
    update = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_delta_weight("default").detach()
    assert torch.equal(before, quantised.data)
    # No matrix of its rank comes nearer: the rest are the smaller singular values.
    rest = torch.linalg.svdvals(error)[8:].square().sum().sqrt()
    assert torch.linalg.norm(error - update.float()) == pytest.approx(rest.item(), rel=1e-3)


def test_loftq_is_refused_when_the_base_has_no_four_bits(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """There is no error to begin from."""
    with pytest.raises(ConfigurationError, match="loftq begins from the error of 4 bits; this base has none"):
        add_adapter(load_tiny_base(tiny_folders["llama"]), _settings(tmp_path, init="loftq"))


def test_noise_on_embeddings_changes_the_run_alone_when_it_is_asked_for(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """NEFTune: other losses than without, the same with the same seed, and no noise in what is measured."""
    losses = []
    for neftune in (None, 5, 5):
        base = load_tiny_base(tiny_folders["llama"])
        run = make_run(base, method_settings(tmp_path / "home", "sft", max_steps=3, neftune=neftune), tmp_path)
        METHODS["sft"](run)
        losses.append(run.listener.losses)  # type: ignore[attr-defined]
        assert not base.model.get_input_embeddings()._forward_hooks

    assert losses[0] != losses[1]
    assert losses[1] == losses[2]


def test_schedule_and_trackers_reach_the_trainer_when_they_are_set(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """A constant rate rises first, too; nobody is reported to unless asked."""
    found = {}
    for schedule in ("cosine", "linear", "constant"):
        settings = method_settings(tmp_path / "home", "sft", schedule=schedule)
        run = make_run(load_tiny_base(tiny_folders["llama"]), settings, tmp_path)
        arguments = common_arguments(run, tmp_path)
        found[schedule] = arguments["lr_scheduler_type"], arguments["report_to"]

    assert found == {
        "cosine": ("cosine", "none"),
        "linear": ("linear", "none"),
        "constant": ("constant_with_warmup", "none"),
    }
