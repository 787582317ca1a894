"""The training methods: which rows each takes, and which settings belong to some of them only.

Written once, for the command line's settings and the wire's hyperparameters, which have the same names but for the
method's own: the hosted API calls `sft` "supervised".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from adapters.chat_rows import RowKind

__all__ = [
    "HELD_TO_A_REFERENCE",
    "METHOD_OF_KIND",
    "METHOD_SETTINGS",
    "ROW_KINDS",
    "SAMPLING_METHODS",
    "WIRE_METHODS",
    "Method",
]

Method = Literal["sft", "dpo", "kto", "reward", "rloo", "grpo"]

ROW_KINDS: Mapping[Method, tuple[RowKind, ...]] = {
    "sft": ("chat", "text"),
    "dpo": ("preference",),
    "kto": ("labelled",),
    "reward": ("preference",),
    "rloo": ("chat",),
    "grpo": ("chat",),
}
# What rows of a kind are checked for where nobody has said by which method they will be trained on.
METHOD_OF_KIND: Mapping[RowKind, Method] = {"chat": "sft", "text": "sft", "preference": "dpo", "labelled": "kto"}
# What a fine-tuning job calls a method.
WIRE_METHODS: Mapping[str, Method] = {
    "supervised": "sft",
    "dpo": "dpo",
    "kto": "kto",
    "reward": "reward",
    "rloo": "rloo",
    "grpo": "grpo",
}

SAMPLING_METHODS: tuple[Method, ...] = ("rloo", "grpo")
HELD_TO_A_REFERENCE: tuple[Method, ...] = ("dpo", "kto", *SAMPLING_METHODS)
_ANSWERING: tuple[Method, ...] = ("sft", *HELD_TO_A_REFERENCE)  # a reward model judges answers and gives none

# Settings that not every method uses -> the methods that do.
METHOD_SETTINGS: Mapping[str, tuple[Method, ...]] = {
    "neftune": ("sft",),
    "dropout": ("sft",),  # the others compare probabilities or scores, which noise would blur
    "beta": HELD_TO_A_REFERENCE,
    "reference": HELD_TO_A_REFERENCE,
    "reward": SAMPLING_METHODS,
    "generations": SAMPLING_METHODS,
    "max_answer_tokens": SAMPLING_METHODS,
    "temperature": SAMPLING_METHODS,
    "use_liger_kernel": _ANSWERING,  # transformers puts its kernels into no model with a head of its own
    "sample_prompts": _ANSWERING,
    "sample_file": _ANSWERING,
    "sample_tokens": _ANSWERING,
    "gate_forgetting": _ANSWERING,
    "gate_samples": _ANSWERING,
    "gate_sample_tokens": _ANSWERING,
    "gate_degenerate": _ANSWERING,
    "gate_format_regex": _ANSWERING,
    "gate_format_schema": _ANSWERING,
    "gate_format_share": _ANSWERING,
}
