"""A base model of a known shape with random weights: speed does not depend on the values.

    python -m benchmarks.random_base /tmp/llama-3-8b
    hotswap bench --base /tmp/llama-3-8b --device cuda --only peft,floor,cold

For machines that have an accelerator and no weights. The weights are finite and small, so that nothing overflows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

__all__ = ["SHAPES", "save_random_base"]

# Source of llama-3-8b: the config that Meta published with the model; the Llama 3 report (arXiv 2407.21783), table 3.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
    "small": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_random_base(folder: Path, shape: str) -> Path:
    """Write a Llama model in bfloat16 and a tokenizer of single bytes.

    Args:
        folder: Of the model; made if it is not there. 16 GB for llama-3-8b.
        shape: A name of `SHAPES`.
    """
    tokenizer = _tokenizer()
    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    # On an accelerator where there is one: drawing eight thousand million numbers takes a CPU minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")  # noqa: S106
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def main() -> None:
    """Write a base model into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    options = parser.parse_args()
    print(save_random_base(options.folder, options.shape))


if __name__ == "__main__":
    main()
