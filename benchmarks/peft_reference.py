"""What is compared with in process: PEFT on its own copy of the base model, loaded by the same function."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.base_model import load_base
from adapters.settings import CoreSettings

__all__ = ["PeftReference"]


class PeftReference:
    """A PEFT model with several adapters, as `PeftModel.from_pretrained` and `load_adapter` leave it."""

    def __init__(self, core: CoreSettings, adapters: Sequence[Path]) -> None:
        from peft import PeftModel

        base = load_base(core)
        self._tokenizer = base.tokenizer
        self._device = base.device
        self._names = [f"adapter{index}" for index in range(len(adapters))]
        model: Any = PeftModel.from_pretrained(base.model, adapters[0], adapter_name=self._names[0])
        for name, folder in zip(self._names[1:], adapters[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        self._model = model.eval()

    def mixed_tokens_per_second(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """One batch, the i-th prompt with the i-th adapter: `generate(adapter_names=...)`."""
        started = time.perf_counter()
        total = self._generate(prompts, num_tokens, adapter_names=self._names[: len(prompts)])
        return total / (time.perf_counter() - started)

    def switching_tokens_per_second(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """One prompt after another, each after `set_adapter` with its own adapter."""
        started = time.perf_counter()
        total = 0
        for name, prompt in zip(self._names, prompts, strict=False):
            self._model.set_adapter(name)
            total += self._generate([prompt], num_tokens)
        return total / (time.perf_counter() - started)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, **options: Any) -> int:
        """Greedy answers of exactly `num_tokens` each; returns the tokens of all."""
        longest = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=pad,
            **options,
        )
        return int(output[:, longest:].numel())
