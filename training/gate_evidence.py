"""Gathers what the gate judges by, all of it on the one base model that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from adapters.adapter_files import parse_adapter_config, parse_adapter_weights
from adapters.base_model import LoadedBase, linear_shapes
from adapters.errors import AdapterRejectedError, IntegrityError, NotFoundError
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, Manifest
from adapters.records import NumberedVersion
from adapters.registry import Registry
from training.config import TrainSettings
from training.evaluation import Evaluator
from training.gate import Evidence, Present
from training.general_text import render_general_text
from training.losses import Evaluation, evaluate
from training.sampling import LONGER_THAN_REFERENCE, Sample, SamplePrompt, sample_answers

__all__ = ["PresentVersion", "gather_evidence", "module_shapes", "read_present"]


@dataclass(frozen=True, slots=True)
class PresentVersion:
    """The version that an alias points to, with its files as they were checked; `problem` says why there are none."""

    version: NumberedVersion
    manifest: Manifest | None = None
    contents: Mapping[str, bytearray] | None = None
    problem: str | None = None


def read_present(registry: Registry, alias: str) -> PresentVersion | None:
    """What an alias points to; None if it points nowhere."""
    try:
        current = registry.alias(alias).current
    except NotFoundError:
        return None
    try:
        manifest, contents = registry.store.read(current.version.digest)
    except (IntegrityError, NotFoundError) as error:
        return PresentVersion(current, problem=str(error))
    return PresentVersion(current, manifest, contents)


def gather_evidence(
    model: PeftModel,
    base: LoadedBase,
    evaluator: Evaluator | None,
    *,
    candidate: Evaluation | None,
    present: PresentVersion | None,
    prompts: Sequence[SamplePrompt],
    problem: str,
    settings: TrainSettings,
) -> Evidence:
    """Measure what is not known yet about the adapter in the model, the base model, and the alias's present version."""
    rows = render_general_text(base.tokenizer)
    pad = base.tokenizer.pad_token_id
    general = evaluate(base.model, rows, batch_size=settings.batch_size, pad_token_id=pad)
    with model.disable_adapter():
        general_of_base = evaluate(base.model, rows, batch_size=settings.batch_size, pad_token_id=pad)
    return Evidence(
        candidate=candidate,
        base=evaluator.measure_base() if evaluator else None,
        general_loss=general.loss,
        general_loss_of_base=general_of_base.loss,
        samples=_sample(base, prompts, settings),
        present=_measure_present(base, evaluator, present) if present else None,
        problem=problem,
    )


def module_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """The linear layers of a base model that has LoRA layers in it, by the paths that they have without."""
    return {name.replace(".base_layer", ""): shape for name, shape in linear_shapes(model).items()}


def _sample(base: LoadedBase, prompts: Sequence[SamplePrompt], settings: TrainSettings) -> list[Sample]:
    # Nobody needs to see how an answer goes on that is too long already.
    longest = max((prompt.reference_tokens or settings.gate_sample_tokens for prompt in prompts), default=0)
    max_tokens = min(settings.gate_sample_tokens, LONGER_THAN_REFERENCE * longest + 1)
    return sample_answers(base.model, base.tokenizer, prompts, max_tokens=max_tokens, batch_size=settings.batch_size)


def _measure_present(base: LoadedBase, evaluator: Evaluator | None, present: PresentVersion) -> Present:
    label, digest = present.version.label, present.version.version.digest
    problem = present.problem or _find_mismatch(base, present)
    if problem is not None or evaluator is None:
        return Present(label, digest, problem=problem)
    assert present.contents is not None, "only a problem leaves it out"
    try:
        config = parse_adapter_config(present.contents[ADAPTER_CONFIG_FILE])
        weights = parse_adapter_weights(present.contents[ADAPTER_WEIGHTS_FILE], config, module_shapes(base.model))
    except AdapterRejectedError as error:
        return Present(label, digest, problem=str(error))
    return Present(label, digest, evaluator.measure_version(weights))


def _find_mismatch(base: LoadedBase, present: PresentVersion) -> str | None:
    made_for = present.manifest.base.fingerprint if present.manifest else None
    if made_for is None or made_for == base.reference.fingerprint:
        return None
    return f"it was made for another base model ({made_for[:12]}, not {base.reference.fingerprint[:12]})"
