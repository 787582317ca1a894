"""A reward model: an adapter on the frozen base model, and a score head that reads its last hidden state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel, set_peft_model_state_dict
from transformers.modeling_outputs import SequenceClassifierOutput

from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from adapters.manifest import ADAPTER_WEIGHTS_FILE, REWARD_HEAD_FILE
from adapters.reward_head import REWARD_HEAD_TENSOR, read_reward_head
from training.log_probs import eval_mode
from training.precision import base_precision
from training.rendering import collate

__all__ = ["RewardModel", "make_head", "save_head", "score_rows"]

_HEAD_STD = 0.02  # as transformers begins the heads of its classifiers


class RewardModel(torch.nn.Module):
    """What TRL's reward trainer takes for a classifier of one label; the base model stays the causal LM that it is."""

    def __init__(self, model: PeftModel, head: torch.nn.Linear) -> None:
        super().__init__()
        self.model = model
        self.head = head
        self.config = copy.deepcopy(model.get_base_model().config)
        self.config.num_labels = 1

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False
    ) -> SequenceClassifierOutput:
        """Rewards of rows padded on the right: `logits [batch, 1]`, float32."""
        base = self.model.get_base_model()
        with base_precision(base):
            hidden = base.get_decoder()(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
            ).last_hidden_state
        last = attention_mask.sum(dim=1) - 1
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), last].float()
        with torch.autocast(chosen.device.type, enabled=False):
            rewards: torch.Tensor = self.head(chosen)
        return SequenceClassifierOutput(logits=rewards)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations of the base model in the backward pass."""
        self.model.gradient_checkpointing_enable(**options)
        self.model.enable_input_require_grads()

    def add_model_tags(self, tags: Any) -> None:
        """TRL's tags are for a model card, which is not written."""

    def save(self, folder: Path) -> None:
        """Write adapter and head, as a version holds them."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=["default"])
        save_head(self.head, folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS_FILE)
        set_peft_model_state_dict(self.model, tensors)
        self.head.weight.data.copy_(read_reward_head(folder, self.head.in_features))


def make_head(base: LoadedBase, seed: int, weight: torch.Tensor | None = None) -> torch.nn.Linear:
    """A score head for a base model, float32: a copy of `weight [1, hidden]`, or small random numbers."""
    size = base.model.config.get_text_config().hidden_size
    head = torch.nn.Linear(size, 1, bias=False, device=base.device, dtype=torch.float32)
    if weight is None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn((1, size), generator=generator) * _HEAD_STD
    head.weight.data.copy_(weight)
    return head


def save_head(head: torch.nn.Linear, folder: Path) -> None:
    """Write a head into a folder, beside its adapter."""
    weight = head.weight.detach().cpu().contiguous()
    safetensors.torch.save_file({REWARD_HEAD_TENSOR: weight}, folder / REWARD_HEAD_FILE)


@torch.no_grad()
def score_rows(model: RewardModel, rows: Sequence[RenderedRow], *, batch_size: int, pad_token_id: int) -> torch.Tensor:
    """The rewards of whole conversations, in eval mode: float32 `[num_rows]`, on the CPU."""
    # Batches are padded: rows of about one length go together.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].input_ids))
    rewards = torch.zeros(len(rows))
    with eval_mode(model):
        for start in range(0, len(rows), batch_size):
            numbers = order[start : start + batch_size]
            batch = collate([rows[number] for number in numbers], pad_token_id=pad_token_id)
            device = model.head.weight.device
            output = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            rewards[numbers] = output.logits[:, 0].cpu()
    return rewards
