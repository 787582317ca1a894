"""Puts a fresh LoRA adapter on a frozen base model, mended where bitsandbytes would train it wrongly."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from adapters.base_model import LoadedBase
from training.config import TrainSettings
from training.losses import check_head_is_plain

__all__ = ["add_adapter", "disable_packed_kernels"]


def add_adapter(base: LoadedBase, settings: TrainSettings) -> PeftModel:
    """Freeze the base model and put a fresh LoRA adapter on every linear layer of its decoder.

    Raises:
        BaseModelError: the model's loss can't be computed here.
    """
    disable_packed_kernels(base.model)
    check_head_is_plain(base.model)
    base.model.requires_grad_(False)
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base.model, config)
    assert isinstance(model, PeftModel)
    # The path of this machine's cache would otherwise travel with every adapter.
    model.peft_config["default"].base_model_name_or_path = base.reference.name
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
