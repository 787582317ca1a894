"""Gathers what the gate judges by, all of it on the one base model that is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from adapters.errors import HotswapError, NotFoundError
from adapters.manifest import Manifest
from adapters.records import NumberedVersion
from adapters.registry import Registry
from training.evaluation import Yardstick
from training.forgetting import Forgetting
from training.gate import Evidence, Present
from training.losses import Evaluation
from training.methods import TrainingRun
from training.sampling import LONGER_THAN_REFERENCE, Sample, SamplePrompt, sample_answers
from training.start import StoredVersion, read_version
from training.watching import FORGETTING

__all__ = ["PresentVersion", "find_present", "gather_evidence"]


@dataclass(frozen=True, slots=True)
class PresentVersion:
    """What an alias points to; `problem` says why its files can't be used here."""

    version: NumberedVersion
    stored: StoredVersion | None = None
    problem: str | None = None

    @property
    def manifest(self) -> Manifest | None:
        """Its manifest, if the files can be used."""
        return self.stored.manifest if self.stored else None


def find_present(
    open_versions: Callable[[], AbstractContextManager[Registry]], alias: str, run: TrainingRun[Any]
) -> PresentVersion | None:
    """Read and check the version that an alias points to; None if it points nowhere."""
    with open_versions() as registry:
        try:
            current = registry.alias(alias).current
        except NotFoundError:
            return None
        try:
            stored = read_version(registry, current.label, run.base)
        except HotswapError as error:  # damaged, or made for another base model: the run must not fail for it
            return PresentVersion(current, problem=str(error))
    if (stored.head is None) != (run.head is None):
        return PresentVersion(current, problem="only one of the two is a reward model")
    return PresentVersion(current, stored)


def gather_evidence(
    run: TrainingRun[Any],
    yardstick: Yardstick | None,
    *,
    candidate: Evaluation | None,
    present: PresentVersion | None,
    prompts: Sequence[SamplePrompt],
) -> Evidence:
    """Measure what is not known yet about the run's adapter, the base model, and the alias's present version."""
    speaks = run.head is None  # nobody hears what a reward model would say
    return Evidence(
        candidate=candidate,
        base=yardstick.measure_base() if yardstick else None,
        general=_measure_general(run, candidate) if speaks else None,
        samples=_sample(run, prompts) if speaks else (),
        present=_measure_present(yardstick, present) if present else None,
    )


def _measure_general(run: TrainingRun[Any], candidate: Evaluation | None) -> tuple[float, float]:
    forgetting = Forgetting(run)
    rise = candidate.extra.get(FORGETTING) if candidate else None
    if rise is None:  # without validation rows nothing has been measured of this state
        return forgetting.measure(), forgetting.base_loss
    return forgetting.base_loss + rise, forgetting.base_loss


def _sample(run: TrainingRun[Any], prompts: Sequence[SamplePrompt]) -> list[Sample]:
    limit = run.settings.gate_sample_tokens
    # Nobody needs to see how an answer goes on that is too long already.
    longest = max((prompt.reference_tokens or limit for prompt in prompts), default=0)
    max_tokens = min(limit, LONGER_THAN_REFERENCE * longest + 1)
    batch_size = run.settings.batch_size
    return sample_answers(
        run.base.model,
        run.base.tokenizer,
        prompts,
        max_tokens=max_tokens,
        batch_size=batch_size,
        ends_flawed=True,
    )


def _measure_present(yardstick: Yardstick | None, present: PresentVersion) -> Present:
    label, digest = present.version.label, present.version.version.digest
    if yardstick is None or present.stored is None:
        return Present(label, digest, problem=present.problem)
    try:
        return Present(label, digest, yardstick.measure_version(present.stored))
    except HotswapError as error:
        return Present(label, digest, problem=str(error))
