"""Puts a LoRA adapter on a frozen base model, fresh or as a copy of a published version.

Mended where bitsandbytes would train it wrongly.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from adapters.base_model import LoadedBase
from adapters.errors import ConfigurationError
from training.config import TrainSettings
from training.flat_rows import install_row_attention, use_true_attention
from training.loftq import begin_from_quantisation_error
from training.losses import check_head
from training.start import StoredVersion, install_version, linear_shapes_of, lora_config

__all__ = ["add_adapter", "disable_packed_kernels"]


def add_adapter(base: LoadedBase, settings: TrainSettings, start: StoredVersion | None = None) -> PeftModel:
    """Freeze the base model and put an adapter on the linear layers of its decoder.

    The adapter is a copy of `start`, with its rank, alpha and targets, or a fresh one as the settings say: all layers
    unless they name some.

    Raises:
        BaseModelError: the model's loss can't be computed here.
        ConfigurationError: a target that the model does not have, or an initialisation that it does not allow.
    """
    disable_packed_kernels(base.model)
    use_true_attention(base.model)
    check_head(base.model)
    install_row_attention(base.model)
    base.model.requires_grad_(False)
    set_seed(settings.seed)
    config = lora_config(start, dropout=settings.dropout) if start else _fresh_config(base, settings)
    model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    # The path of this machine's cache would otherwise travel with every adapter.
    model.peft_config["default"].base_model_name_or_path = base.reference.name
    if start is not None:
        install_version(model, start, "default")
    elif settings.init == "loftq":
        begin_from_quantisation_error(model, base.folder)
    return model


def disable_packed_kernels(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking the weights of a model that is to be trained; returns how many layers it has.

    With bitsandbytes 0.50.2 on a CPU with AVX512-BF16, the first forward pass in eval mode repacks a Linear4bit for an
    operator without autograd. From then on no gradient passes through that layer, in training mode either: evaluate
    once, and everything that is trained afterwards is trained on wrong gradients (their cosine to the right ones is 0.3
    on SmolLM2-135M), while the loss goes on falling. The flag exists on every machine; it matters where the fast path
    does.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def _fresh_config(base: LoadedBase, settings: TrainSettings) -> LoraConfig:
    _check_targets(base, settings.targets)
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        target_modules=list(settings.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )


def _check_targets(base: LoadedBase, targets: tuple[str, ...]) -> None:
    paths = linear_shapes_of(base)
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths}))
            raise ConfigurationError(
                f"setting train.targets: the base model has no linear layer {target!r} in its decoder; it has {names}"
            )
