"""Evaluates the experiments that run, again and again, in the API process: verdicts change, and some are acted on."""

from __future__ import annotations

import asyncio

import structlog

from adapters.experiment_evaluation import ExperimentEvaluation

__all__ = ["Evaluator"]

_log = structlog.get_logger(__name__)


class Evaluator:
    """A task beside the routes. Several API processes may each have one: an act is done once (see there).

    Args:
        evaluation: Acts in the evaluator's own name.
        interval_s: Seconds between two evaluations.
    """

    def __init__(self, evaluation: ExperimentEvaluation, *, interval_s: float) -> None:
        self._evaluation = evaluation
        self._interval_s = interval_s

    async def run(self) -> None:
        """Evaluate until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self._evaluation.evaluate_all)
            except Exception:
                # The boundary of the process: a server without this task would stop, and serving comes first. A
                # locked or lost database answers requests with an error; this has nobody to tell and tries again.
                _log.exception("experiments_not_evaluated")
            await asyncio.sleep(self._interval_s)
