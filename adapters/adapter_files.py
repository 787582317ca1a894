"""Reads a LoRA adapter in PEFT's layout, strictly: a schema of our own for the config, safetensors for the weights.

PEFT's own config can name modules to import and options that the engine does not compute; both are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import AdapterConfigError, AdapterWeightsError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterConfig", "AdapterWeights", "read_adapter_config", "read_adapter_weights"]

_MAX_CONFIG_BYTES = 1 << 20
_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")

# Keys of PEFT's LoraConfig that describe or regularise training and leave the result's arithmetic alone.
_HARMLESS_KEYS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Initialisations that leave the base model's weights as they were.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


class AdapterConfig(BaseModel):
    """The part of PEFT's `adapter_config.json` that decides what an adapter computes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=4096)
    lora_alpha: float = Field(gt=0, le=65536)
    target_modules: list[str] | str
    use_rslora: bool = False
    bias: Literal["none"] = "none"

    @property
    def scaling(self) -> float:
        """Factor of B @ A: alpha / rank (arXiv 2106.09685, section 4.1), or alpha / sqrt(rank) (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """Validated tensors by module path: A `[rank, in_features]`, B `[out_features, rank]` with the scaling in it."""

    rank: int
    modules: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Parse `adapter_config.json` with a strict schema.

    Raises:
        AdapterConfigError: missing, not JSON, or asks for something that the engine does not compute; names the key.
    """
    path = folder / ADAPTER_CONFIG_FILE
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is missing") from None
    except (ValueError, RecursionError) as error:
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise AdapterConfigError(f"{ADAPTER_CONFIG_FILE} must hold an object, found {type(document).__name__}")
    return _parse_config(document)


def read_adapter_weights(
    folder: Path, config: AdapterConfig, module_shapes: Mapping[str, tuple[int, int]] | None = None
) -> AdapterWeights:
    """Read and check `adapter_model.safetensors`.

    Args:
        folder: An adapter in PEFT's layout.
        config: Its parsed config.
        module_shapes: The base model's linear layers, path -> (in_features, out_features); None skips that check.

    Returns:
        A as stored; B in float32 with the scaling folded in.

    Raises:
        AdapterWeightsError: not safetensors, an unknown tensor, a missing side, a wrong shape or rank, a value that is
            not finite, or no effect at all.
    """
    tensors = _load_tensors(folder / ADAPTER_WEIGHTS_FILE)
    sides = _group_by_module(tensors)
    modules = {}
    for module, pair in sides.items():
        _check_pair(module, pair, config.r, module_shapes)
        modules[module] = (pair["A"], _scale(module, pair["B"], config.scaling))
    if not modules:
        raise AdapterWeightsError("the adapter holds no tensors")
    if not any(bool(a.count_nonzero()) and bool(b.count_nonzero()) for a, b in modules.values()):
        raise AdapterWeightsError(
            "every product B A is zero: the adapter has no effect (was it saved before training?)"
        )
    return AdapterWeights(config.r, modules)


def _parse_config(document: dict[str, Any]) -> AdapterConfig:
    known = set(AdapterConfig.model_fields)
    initialisation = document.pop("init_lora_weights", True)
    if initialisation not in _PLAIN_INITIALISATIONS:
        raise AdapterConfigError(f"init_lora_weights={initialisation!r} changes the base model and is not supported")
    for key in set(document) - known:
        # What is neither understood nor harmless may only hold its neutral value.
        if key not in _HARMLESS_KEYS and document[key] not in (None, False, {}, []):
            raise AdapterConfigError(f"{key}={document[key]!r} is not supported")
    try:
        return AdapterConfig.model_validate({key: document[key] for key in known & set(document)})
    except ValidationError as error:
        detail = error.errors()[0]
        raise AdapterConfigError(f"{detail['loc'][0]}: {detail['msg']}, found {detail['input']!r:.80}") from None


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise AdapterWeightsError(f"{ADAPTER_WEIGHTS_FILE} is missing (other formats are not read)") from None
    except (SafetensorError, ValueError) as error:
        raise AdapterWeightsError(f"{ADAPTER_WEIGHTS_FILE} is not a safetensors file: {error}") from None
    return tensors


def _group_by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise AdapterWeightsError(f"tensor {name!r:.120} is not a LoRA weight of a linear layer")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        if missing := {"A", "B"} - set(pair):
            raise AdapterWeightsError(f"{module} has no lora_{missing.pop()}")
    return sides


def _scale(module: str, b: torch.Tensor, scaling: float) -> torch.Tensor:
    scaled = b.float() * scaling
    if not bool(scaled.isfinite().all()):
        raise AdapterWeightsError(f"{module}: lora_B overflows when it is scaled by {scaling:g}")
    return scaled


def _check_pair(
    module: str, pair: Mapping[str, torch.Tensor], rank: int, module_shapes: Mapping[str, tuple[int, int]] | None
) -> None:
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterWeightsError(
            f"{module}: expected lora_A [{rank}, in] and lora_B [out, {rank}], "
            f"found {list(a.shape)} and {list(b.shape)}"
        )
    for side, tensor in pair.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterWeightsError(f"{module}: lora_{side} holds values that are not finite numbers")
    if module_shapes is None:
        return
    if module not in module_shapes:
        raise AdapterWeightsError(f"the base model has no linear layer {module!r:.120}")
    found = (a.shape[1], b.shape[0])
    if found != module_shapes[module]:
        raise AdapterWeightsError(
            f"{module}: the base model's layer is {module_shapes[module][0]} -> {module_shapes[module][1]}, "
            f"the adapter's is {found[0]} -> {found[1]}"
        )
