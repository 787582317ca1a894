"""The version that a run goes on from, or is judged by: read from the store and checked as the engine would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict

from adapters.adapter_files import AdapterConfig, parse_adapter_config, parse_adapter_weights
from adapters.base_model import LoadedBase, linear_shapes
from adapters.errors import ConfigurationError, FingerprintMismatchError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, REWARD_HEAD_FILE, Manifest
from adapters.registry import Registry
from adapters.reward_head import parse_reward_head

__all__ = ["StoredVersion", "install_version", "linear_shapes_of", "lora_config", "read_version"]


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A published version, as it lies in the store: its tensors by name, without the scaling in them.

    `targets` are the ends of the paths of the layers that have an adapter, or whole paths where not all layers of one
    name have. `head` is the score head of a reward model, float32 `[1, hidden]`.
    """

    label: str
    digest: str
    manifest: Manifest
    config: AdapterConfig
    tensors: Mapping[str, torch.Tensor]
    targets: tuple[str, ...]
    head: torch.Tensor | None


def read_version(registry: Registry, name: str, base: LoadedBase) -> StoredVersion:
    """Read a version (`legal`, `legal@v2`) that was made for this base model, every hash and tensor checked.

    Raises:
        NotFoundError: no such alias or version.
        FingerprintMismatchError: it was made for another base model.
        AdapterRejectedError, IntegrityError: its files are not what they must be.
    """
    found = registry.find(name)
    manifest, files = registry.store.read(found.version.digest)
    if manifest.base.fingerprint != base.reference.fingerprint:
        raise FingerprintMismatchError(adapter=manifest.base.fingerprint, base=base.reference.fingerprint)
    config = parse_adapter_config(files[ADAPTER_CONFIG_FILE])
    content, shapes = files[ADAPTER_WEIGHTS_FILE], linear_shapes_of(base)
    weights = parse_adapter_weights(content, config, shapes)
    return StoredVersion(
        label=found.label,
        digest=found.version.digest,
        manifest=manifest,
        config=config,
        tensors=safetensors.torch.load(bytes(content)),
        targets=_shorten(set(weights.modules), set(shapes)),
        head=_read_head(manifest, files, base),
    )


def linear_shapes_of(base: LoadedBase) -> dict[str, tuple[int, int]]:
    """The base model's linear layers by their own names, also where adapters have been put around them."""
    return {name.replace(".base_layer", ""): shape for name, shape in linear_shapes(base.model).items()}


def install_version(model: PeftModel, version: StoredVersion, adapter_name: str) -> None:
    """Copy a version's tensors into an adapter of the model, made with `lora_config`.

    Raises:
        ConfigurationError: the adapter has other tensors than the version.
    """
    result = set_peft_model_state_dict(model, dict(version.tensors), adapter_name=adapter_name)
    missing = [key for key in result.missing_keys if f".{adapter_name}." in key and ".lora_" in key]
    if missing or result.unexpected_keys:
        odd = (missing + list(result.unexpected_keys))[0]
        raise ConfigurationError(f"{version.label} can't be gone on from: its tensors don't fit, the first is {odd}")


def lora_config(version: StoredVersion, *, dropout: float = 0.0) -> LoraConfig:
    """PEFT's config of an adapter into which the version's tensors fit."""
    config = version.config
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=dropout,
        use_rslora=config.use_rslora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        target_modules=list(version.targets),
        task_type="CAUSAL_LM",
    )


def _shorten(paths: set[str], all_paths: set[str]) -> tuple[str, ...]:
    ends = {path.rsplit(".", 1)[-1] for path in paths}
    reached = {path for path in all_paths if path.rsplit(".", 1)[-1] in ends}
    return tuple(sorted(ends if reached == paths else paths))


def _read_head(manifest: Manifest, files: Mapping[str, bytearray], base: LoadedBase) -> torch.Tensor | None:
    if manifest.kind != "reward":
        return None
    return parse_reward_head(files[REWARD_HEAD_FILE], base.model.config.get_text_config().hidden_size)
