"""How well published versions would have given answers that others gave: the loss of each answer under each version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.base_model import LoadedBase
from adapters.chat_rows import ChatRow, parse_document
from adapters.chat_template import RenderedRow, render_training_rows
from adapters.errors import InvalidInputError
from adapters.records import BASE_MODEL_NAME
from adapters.registry import Registry
from training.config import TrainSettings
from training.lora import add_adapter
from training.losses import evaluate
from training.start import install_version, lora_config, read_version

__all__ = ["measure_answers", "render_answer"]

_OTHER = "other"


def render_answer(
    base: LoadedBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], max_length: int
) -> RenderedRow | None:
    """The tokens of a conversation, with loss on its last message alone, as training writes them.

    None if the chat template refuses it, or it is longer than `max_length` tokens.
    """
    row, problems = parse_document({"messages": [*messages], **({"tools": [*tools]} if tools else {})})
    if problems or not isinstance(row, ChatRow):
        return None
    try:
        (rendered,) = render_training_rows(base.tokenizer, row.messages, row.tools, only_last=True)
    except InvalidInputError:
        return None
    return rendered if len(rendered.input_ids) <= max_length else None


def measure_answers(
    registry: Registry, base: LoadedBase, settings: TrainSettings, rows: Mapping[str, Sequence[RenderedRow]]
) -> dict[str, list[float]]:
    """The mean loss a token, in nats, of each row's answer under a version.

    Args:
        registry: Where the versions are.
        base: Is changed: it has adapters afterwards.
        settings: How many rows are computed at once.
        rows: By version (`legal@v2`, or `base`), what it is asked for; none is empty.

    Raises:
        NotFoundError, FingerprintMismatchError, AdapterRejectedError, IntegrityError: a version can't be used here.
    """
    stored = {name: read_version(registry, name, base) for name in rows if name != BASE_MODEL_NAME}
    model = add_adapter(base, settings, next(iter(stored.values()), None))
    trained = model.active_adapter
    losses = {}
    for name, asked in rows.items():
        if name == BASE_MODEL_NAME:
            with model.disable_adapter():
                losses[name] = _losses(base, settings, asked)
            continue
        model.add_adapter(_OTHER, lora_config(stored[name]))
        install_version(model, stored[name], _OTHER)
        model.set_adapter(_OTHER, inference_mode=True)
        losses[name] = _losses(base, settings, asked)
        model.set_adapter(trained)
        model.delete_adapter(_OTHER)
    return losses


def _losses(base: LoadedBase, settings: TrainSettings, rows: Sequence[RenderedRow]) -> list[float]:
    options = {"batch_size": settings.batch_size, "pad_token_id": base.tokenizer.pad_token_id}
    found = evaluate(base.model, rows, **options)
    return [float(loss) for loss in found.losses / found.weights]
