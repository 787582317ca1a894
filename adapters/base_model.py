"""Loads the base model: one function for training and serving, so that adapters meet the weights they were made on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adapters.base_files import compute_fingerprint, public_name, pull_base
from adapters.errors import BaseModelError, ConfigurationError
from adapters.manifest import BaseReference
from adapters.settings import CoreSettings

__all__ = [
    "LoadedBase",
    "linear_shapes",
    "load_base",
    "load_tokenizer",
    "pick_device",
    "read_hidden_size",
    "read_module_shapes",
]


@dataclass(slots=True)
class LoadedBase:
    """A base model on its device, in eval mode, with its tokenizer and identity."""

    model: Any
    tokenizer: Any
    folder: Path
    reference: BaseReference
    device: torch.device


def pick_device(device: str) -> torch.device:
    """Turn the setting into a device; `auto` is CUDA if present, otherwise the CPU.

    Raises:
        ConfigurationError: CUDA is asked for and there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device!r} was asked for, but this machine offers torch no CUDA device")
    return torch.device(device)


def load_base(settings: CoreSettings) -> LoadedBase:
    """Load the base model as the settings say, fetching it first if it is not on this machine.

    `nf4` is bitsandbytes NF4 with double quantisation and bfloat16 arithmetic (arXiv 2305.14314, section 3); `none`
    keeps the weights as stored.

    Raises:
        BaseModelError: it can't be fetched or loaded.
        ConfigurationError: the device is not there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    device = pick_device(settings.device)
    folder = pull_base(settings.base, settings.home)
    fingerprint = compute_fingerprint(folder, quantisation=settings.quantisation)
    transformers_logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    try:
        model, report = loader.from_pretrained(
            folder,
            device_map={"": device},
            local_files_only=True,
            output_loading_info=True,
            **_weight_options(settings.quantisation),
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(f"the base model in {folder} can't be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise BaseModelError(f"the base model in {folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    model.eval()
    reference = BaseReference(
        name=public_name(settings.base), fingerprint=fingerprint, quantisation=settings.quantisation
    )
    return LoadedBase(model, load_tokenizer(folder), folder, reference, device)


def load_tokenizer(folder: Path) -> Any:
    """Load a base model's tokenizer.

    Raises:
        BaseModelError: there is none, or it has no chat template or end-of-sequence token.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder} holds no tokenizer that can be loaded: {error}") from error
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise BaseModelError(f"the tokenizer in {folder} has no chat template or no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position, so that any token will do
    return tokenizer


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """The linear layers inside the decoder, path -> (in_features, out_features); the output head is not among them."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def read_module_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """`linear_shapes` of a base model from its config alone; no weight is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return linear_shapes(AutoModelForCausalLM.from_config(config))


def read_hidden_size(folder: Path) -> int:
    """How many numbers the hidden state of a base model's last layer has, from its config alone."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    size: int = config.get_text_config().hidden_size
    return size


def _weight_options(quantisation: str) -> dict[str, Any]:
    if quantisation == "none":
        return {"dtype": "auto"}
    from transformers import BitsAndBytesConfig

    # bitsandbytes computes in float32 unless told otherwise: right, but silently slow.
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"dtype": torch.bfloat16, "quantization_config": config}
