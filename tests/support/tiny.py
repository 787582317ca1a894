"""Tiny random models of real architectures, with a byte-level tokenizer (any text) and a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from adapters.base_model import LoadedBase, load_base, read_module_shapes
from adapters.manifest import BaseReference, Manifest
from adapters.settings import CoreSettings

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As the templates of Qwen and Hermes: tools in the system's turn, calls and what they gave in tags.
CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    '<tool_call>{"name": <name>, "arguments": <object>}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    # A window shorter than the tests' prompts, so that a mask without it gives other tokens.
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 12}),
    # Caps low enough that tokens differ without them; one layer with a window and one without.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 12,
            "attn_logit_softcapping": 0.3,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,  # tied, its answers repeat the last token whatever attention does
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
    # Query, key and value in one projection, gate and up in another.
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16}),
    # Half of each head is rotated; gate and up in one projection.
    "glm4": (Glm4Config, Glm4ForCausalLM, {"head_dim": 16}),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    # One layer with rotary embeddings and one without.
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 0]}),
}
# What a model with fused projections calls the layers that recipes name.
_FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}


def make_tokenizer(chat_template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and two special tokens; pad is EOS, as in many chat models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_tiny_base(folder: Path, family: str = "llama", *, seed: int = 0) -> Path:
    """Write a two-layer random model in float32 with its tokenizer."""
    tokenizer = make_tokenizer()
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # wide enough that the likeliest token is clearly the likeliest
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny_base(folder: Path, *, quantisation: str = "none", device: str = "cpu") -> LoadedBase:
    """Load a folder with the product's own loader, in float32 unless told otherwise."""
    return load_base(tiny_settings(folder, quantisation=quantisation, device=device))


def tiny_settings(
    folder: Path, *, home: Path | None = None, quantisation: str = "none", device: str = "cpu"
) -> CoreSettings:
    """Settings that name a tiny base model, on the CPU unless told otherwise."""
    return CoreSettings.load(home or folder / "home", base=str(folder), device=device, quantisation=quantisation)


def save_random_adapter(
    target: Path, base_folder: Path, *, seed: int, rank: int = 4, alpha: float = 8, modules: tuple[str, ...] = ()
) -> Path:
    """Write an adapter in PEFT's layout with random A and B, strong enough to change the answer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = read_module_shapes(base_folder)
    targets = {attribute for name in shapes if _is_target(attribute := name.rsplit(".", 1)[-1], modules)}
    for name, (num_in, num_out) in shapes.items():
        if name.rsplit(".", 1)[-1] not in targets:
            continue
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, num_in, generator=generator) * 0.1
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, rank, generator=generator) * 0.1
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def _is_target(attribute: str, modules: tuple[str, ...]) -> bool:
    return not modules or attribute in modules or not _FUSED.get(attribute, set()).isdisjoint(modules)


def make_manifest(reference: BaseReference, *, rank: int = 4, alpha: float = 8) -> Manifest:
    """A manifest for `save_random_adapter`."""
    return Manifest(source="imported", base=reference, rank=rank, alpha=alpha, target_modules=["q_proj"])
