"""Begins an adapter from what the 4 bits of the base model lost, so that training starts nearer to the full weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open

from adapters.errors import ConfigurationError

__all__ = ["begin_from_quantisation_error"]


@torch.no_grad()
def begin_from_quantisation_error(model: PeftModel, base_folder: Path) -> None:
    """Set each lora_A and lora_B to the best approximation of its rank to (stored weight - 4-bit weight).

    The 4-bit weights stay as they are, which is what lets one base serve all adapters.

    Args:
        model: A fresh adapter `default` on a 4-bit base, modified in place.
        base_folder: Where the base model's stored weights lie, in safetensors.

    Raises:
        ConfigurationError: the base is not in 4 bits, or its stored weights are not there.

    Source: LoftQ (arXiv 2310.08659) algorithm 1 with one alternation, the quantised weights being given.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora.bnb import Linear4bit

    layers = {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, Linear4bit)
    }
    if not layers:
        raise ConfigurationError("setting train.init: loftq begins from the error of 4 bits; this base has none (nf4)")
    stored = _locate_weights(base_folder)
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        error = _read(stored, f"{name}.weight").to(weight.device).float()
        error -= dequantize_4bit(weight.data, weight.quant_state).float()
        lora_a, lora_b = _factorise(error, layer.r["default"])
        # A layer narrower than the rank has fewer values; what is left over stays without effect.
        layer.lora_A["default"].weight.zero_()[: len(lora_a)] = lora_a
        layer.lora_B["default"].weight.zero_()[:, : len(lora_a)] = lora_b / layer.scaling["default"]


def _factorise(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and B `[out, rank]` with B A nearest to the matrix `[out, in]`; both get half of each value."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def _locate_weights(folder: Path) -> dict[str, Path]:
    located: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            located |= dict.fromkeys(file.keys(), path)
    return located


def _read(located: dict[str, Path], name: str) -> torch.Tensor:
    if name not in located:
        raise ConfigurationError(f"setting train.init: loftq needs the base model's stored weights; {name} is missing")
    with safe_open(located[name], framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
