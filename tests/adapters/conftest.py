"""Experiments on an alias with three versions, and what evaluates them."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.experiment_evaluation import EVALUATOR, ExperimentEvaluation
from adapters.experiments import ExperimentService
from adapters.records import AnalysisPlan, Experiment
from adapters.registry import Registry
from tests.support.experiments import ERRORS, HALVES, SOLVED, Start
from tests.support.versions import publish_text


@pytest.fixture
def experiments(registry: Registry) -> ExperimentService:
    """Experiments on an alias with three versions, pointing to the last."""
    for content in ("one", "two", "three"):
        publish_text(registry, content)
    return ExperimentService(registry.database)


@pytest.fixture
def start(registry: Registry) -> Start:
    """Start an experiment on `legal`, which points to v1 of three versions."""
    for content in ("one", "two", "three"):
        publish_text(registry, content, promote=content == "one")

    def create(arms: list[tuple[str, str, float]] = HALVES, **plan: Any) -> Experiment:
        usual: dict[str, Any] = {"metric": SOLVED, "guardrails": (ERRORS,), "planned_units": 1000}
        wanted = AnalysisPlan(**usual | plan)
        return ExperimentService(registry.database).create("legal", arms, salt="s", plan=wanted)

    return create


@pytest.fixture
def evaluation(registry: Registry) -> ExperimentEvaluation:
    """Acts in the evaluator's name."""
    return ExperimentEvaluation(registry).acting_for(EVALUATOR)
