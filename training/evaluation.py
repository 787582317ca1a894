"""Measures a model on the validation rows: as it stands in training, as the bare base, or with a published version."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import cast

import numpy as np
import torch
from peft import PeftModel

from adapters.adapter_files import AdapterWeights
from adapters.base_model import LoadedBase
from adapters.chat_template import RenderedRow
from training.config import TrainSettings
from training.losses import Evaluation, evaluate
from training.rendering import Rendered, RenderedLabel, RenderedPair

__all__ = ["Evaluator", "applied", "compare_labels", "compare_pairs"]

_CHANCE = 0.5  # what a guess between two is right by


class Evaluator:
    """Losses on fixed rows. All of them are computed on the one base model that is loaded.

    Rows with tokens: cross-entropy and token accuracy on the tokens that carry loss. Pairs and labelled answers: the
    loss of DPO and KTO with the bare base as reference, whatever the reference in training is, so that a run, the base
    and a published version stand on one scale; right is what is preferred as it should be, compared with the base.

    Args:
        model: The base model with the adapter that is trained.
        base: The same base model, its tokenizer and device.
        rows: All of one kind.
        settings: Batch size, and beta for pairs and labels.
    """

    def __init__(self, model: PeftModel, base: LoadedBase, rows: Sequence[Rendered], settings: TrainSettings) -> None:
        self._model = model
        self._base = base
        self._rows = rows
        self._settings = settings

    def measure(self) -> Evaluation:
        """The model as it stands."""
        return self._finish(self._log_probs())

    def measure_base(self) -> Evaluation:
        """The base model alone."""
        return self._finish(self._of_base)

    def measure_version(self, weights: AdapterWeights) -> Evaluation:
        """The base model with a published version, applied as the server applies it."""
        with self._model.disable_adapter(), applied(self._base.model, weights):
            return self._finish(self._log_probs())

    @cached_property
    def _of_base(self) -> list[Evaluation]:
        with self._model.disable_adapter():
            return self._log_probs()

    def _log_probs(self) -> list[Evaluation]:
        return [self._evaluate(rows) for rows in _split(self._rows)]

    def _evaluate(self, rows: Sequence[RenderedRow]) -> Evaluation:
        pad = self._base.tokenizer.pad_token_id
        return evaluate(self._base.model, rows, batch_size=self._settings.batch_size, pad_token_id=pad)

    def _finish(self, found: list[Evaluation]) -> Evaluation:
        first, beta = self._rows[0], self._settings.beta
        if isinstance(first, RenderedPair):
            return compare_pairs(found, self._of_base, beta=beta)
        if isinstance(first, RenderedLabel):
            labels = [row.label for row in self._rows if isinstance(row, RenderedLabel)]
            return compare_labels(found[0], self._of_base[0], np.array(labels), beta=beta)
        return found[0]


def compare_pairs(found: Sequence[Evaluation], of_base: Sequence[Evaluation], *, beta: float) -> Evaluation:
    """The loss of each pair, -log sigmoid(beta * gain).

    The gain is how much more than the base the model prefers the chosen answer to the rejected one, in nats.

    Source: DPO (arXiv 2305.18290), equation 7, with the base as reference: it has the loss log 2 itself.
    """
    (chosen, rejected), (base_chosen, base_rejected) = found, of_base
    gain = (rejected.losses - chosen.losses) - (base_rejected.losses - base_chosen.losses)
    return Evaluation(np.logaddexp(0, -beta * gain), np.ones(len(gain)), _share_right(gain))


def compare_labels(found: Evaluation, of_base: Evaluation, labels: np.ndarray, *, beta: float) -> Evaluation:
    """The loss of each labelled answer, 1 - sigmoid(beta * gain).

    The gain is how much likelier than to the base a good answer is to the model, in nats, or how much less likely a bad
    one.

    Source: KTO (arXiv 2402.01306), equation 7, with the reference point 0: the base has the loss 1/2 itself.
    """
    gain = np.where(labels, 1, -1) * (of_base.losses - found.losses)
    return Evaluation(1 / (1 + np.exp(np.clip(beta * gain, -500, 500))), np.ones(len(gain)), _share_right(gain))


@contextmanager
def applied(model: torch.nn.Module, weights: AdapterWeights) -> Iterator[None]:
    """Let linear layers add a version's low-rank update to what they give, and leave them as they were afterwards."""
    layers = {name.replace(".base_layer", ""): module for name, module in model.named_modules() if _is_linear(module)}
    hooks = [_hook(layers[name], a, b) for name, (a, b) in weights.modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(layer: torch.nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.utils.hooks.RemovableHandle:
    device = cast("torch.Tensor", layer.weight).device
    down, up = a.to(device), b.to(device)  # [rank, in_features], [out_features, rank]

    def add(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        x = given[0]
        return out + ((x @ down.to(x.dtype).T) @ up.to(x.dtype).T).to(out.dtype)

    return layer.register_forward_hook(add)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def _split(rows: Sequence[Rendered]) -> list[list[RenderedRow]]:
    """The rows of tokens: one list, or the chosen and the rejected answers."""
    if isinstance(rows[0], RenderedPair):
        pairs = [row for row in rows if isinstance(row, RenderedPair)]
        return [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
    return [[row.row if isinstance(row, RenderedLabel) else cast("RenderedRow", row) for row in rows]]


def _share_right(gain: np.ndarray) -> np.ndarray:
    right: np.ndarray = np.where(gain == 0, _CHANCE, gain > 0).astype(np.float64)
    return right
