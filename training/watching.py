"""Watches a run: validates it now and then, keeps the best state, ends it when nothing improves, and raises alarms."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.errors import TrainingDivergedError
from training.alarms import AlarmKind, EvaluationPoint, StepPoint, find_alarms, find_remark
from training.losses import Evaluation
from training.progress import StepMetrics
from training.run_log import RunLog
from training.sampling import Sample, find_flaw

__all__ = ["FORGETTING", "STATE_FILE", "Best", "Ended", "RunListener", "Watch", "WatchPlan"]

STATE_FILE = "watch.safetensors"
_WEIGHTS, _EVALUATION = "weights/", "evaluation/"
_STATE = "state"
FORGETTING = "forgetting"  # in an evaluation's `extra`: by how much the loss on general text has risen, nats a token
_ALWAYS_RAISED: tuple[AlarmKind, ...] = ("not_a_number", "forgetting")
_ARRAYS = ("losses", "weights", "num_right", "scores")


class RunListener(Protocol):
    """Told what a watch found."""

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """The validation rows were measured after a step."""

    def on_warning(self, message: str) -> None:
        """Something is wrong that does not end the run."""


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """What is done when. Without `measure` there are no validation rows, and the last state is the best.

    `forgetting` says at each validation by how many nats a token the loss on general text has risen over the base
    model's; a state with more than `max_forgetting` is the best only while there is no other.

    `eval_steps` None validates wherever a checkpoint is due, or would be: at the end of each epoch, unless told
    otherwise. `patience` None never ends a run early. `has_alarms` False is for losses that need not fall.
    """

    measure: Callable[[], Evaluation] | None = None
    forgetting: Callable[[], float] | None = None
    max_forgetting: float = math.inf
    sample: Callable[[], Sequence[Sample]] | None = None
    eval_steps: int | None = None
    patience: int | None = None
    has_alarms: bool = True


@dataclass(frozen=True, slots=True)
class Best:
    """The state with the lowest validation loss so far, of those that forget too much only if all do; or the first."""

    step: int
    evaluation: Evaluation
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Ended:
    """Where a run was ended early: at which step, and tokens seen by then."""

    step: int
    num_tokens: int


class Watch:
    """The state of watching one run.

    What it decides depends on the steps alone, so that a run that went on from a checkpoint ends as one that was let
    alone.

    Args:
        model: Whose trainable parameters are kept when they are the best.
        plan: What to do when.
        log: Where everything is written down; its lines tell what happened before the run was interrupted.
        listener: Told of evaluations and alarms.
    """

    def __init__(self, model: torch.nn.Module, plan: WatchPlan, *, log: RunLog, listener: RunListener) -> None:
        self._model = model
        self._plan = plan
        self._log = log
        self._listener = listener
        self._steps, self._evaluations, self._raised = _read_history(log)
        self._num_since_best = 0
        self.best: Best | None = None
        self.ended_at: Ended | None = None

    def is_due(self, step: int, *, is_scheduled: bool, is_last: bool) -> bool:
        """Whether the rows are to be validated after this step; the last one always is."""
        if self._plan.measure is None and self._plan.sample is None:
            return False
        every = self._plan.eval_steps
        return is_last or (is_scheduled if every is None else step % every == 0)

    def on_step(self, metrics: StepMetrics) -> None:
        """Write a step down and look for alarms.

        Raises:
            TrainingDivergedError: there is no point in going on.
        """
        values = {
            "num_steps": metrics.num_steps,
            "train_loss": metrics.loss,
            "train_accuracy": metrics.accuracy,
            "num_tokens": metrics.num_tokens,
            "learning_rate": metrics.learning_rate,
            "gradient_norm": metrics.gradient_norm,
            **metrics.extra,
        }
        self._log.note("step", metrics.step, values)
        self._steps.append(StepPoint(metrics.step, metrics.loss, metrics.gradient_norm))
        self._raise_alarms(metrics.step)

    def evaluate(self, metrics: StepMetrics) -> Evaluation | None:
        """Validate and sample after a step; `ended_at` is set once patience has run out.

        Raises:
            TrainingDivergedError: the validation loss is not a number.
        """
        self._sample(metrics.step)
        if self._plan.measure is None:
            return None
        evaluation = self._plan.measure()
        if self._plan.forgetting is not None:
            evaluation = replace(evaluation, extra={**evaluation.extra, FORGETTING: self._plan.forgetting()})
        loss, accuracy = evaluation.loss, evaluation.accuracy
        self._log.note("evaluation", metrics.step, {"valid_loss": loss, "valid_accuracy": accuracy, **evaluation.extra})
        self._evaluations.append(EvaluationPoint(metrics.step, loss, accuracy, evaluation.extra.get(FORGETTING)))
        self._listener.on_evaluation(metrics, evaluation)
        self._raise_alarms(metrics.step)
        self._keep_if_best(metrics, evaluation)
        return evaluation

    def restore_best(self) -> int | None:
        """Put the best state's weights into the model; returns its step, None if nothing was validated."""
        if self.best is None:
            return None
        with torch.no_grad():
            for name, parameter in _trainable(self._model):
                parameter.copy_(self.best.weights[name])
        return self.best.step

    def remark(self, before: Evaluation | None) -> str | None:
        """What is to be said at the run's end of its validation losses; `before` is that before the first step.

        Nothing where answers are sampled, whose losses scatter.
        """
        if before is None or self.best is None or not self._plan.has_alarms:
            return None
        best = EvaluationPoint(self.best.step, self.best.evaluation.loss)
        return find_remark(before.loss, self._evaluations, best)

    def save(self, folder: Path) -> None:
        """Write what must not be lost beside a checkpoint; nothing while nothing was validated."""
        if self.best is None:
            return
        tensors = {_WEIGHTS + name: tensor for name, tensor in self.best.weights.items()}
        for name in _ARRAYS:
            if (array := getattr(self.best.evaluation, name)) is not None:
                tensors[_EVALUATION + name] = torch.from_numpy(array)
        state: dict[str, Any] = {
            "step": self.best.step,
            "extra": dict(self.best.evaluation.extra),
            "num_since_best": self._num_since_best,
        }
        if self.ended_at is not None:
            state |= {"ended_at": self.ended_at.step, "num_tokens": self.ended_at.num_tokens}
        save_file(tensors, folder / STATE_FILE, {_STATE: json.dumps(state)})

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote into this checkpoint, if it wrote anything."""
        if not (folder / STATE_FILE).exists():
            return
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            state = json.loads(file.metadata()[_STATE])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        weights = {name.removeprefix(_WEIGHTS): t for name, t in tensors.items() if name.startswith(_WEIGHTS)}
        arrays = {
            name.removeprefix(_EVALUATION): tensor.numpy()
            for name, tensor in tensors.items()
            if name.startswith(_EVALUATION)
        }
        self.best = Best(state["step"], Evaluation(**arrays, extra=state["extra"]), weights)
        self._num_since_best = state["num_since_best"]
        if "ended_at" in state:
            self.ended_at = Ended(state["ended_at"], state["num_tokens"])

    def _keep_if_best(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        if self.best is None or self._rank(evaluation) < self._rank(self.best.evaluation):
            weights = {name: parameter.detach().cpu().clone() for name, parameter in _trainable(self._model)}
            self.best = Best(metrics.step, evaluation, weights)
            self._num_since_best = 0
            return
        self._num_since_best += 1
        if self._plan.patience is not None and self._num_since_best >= self._plan.patience:
            self.ended_at = Ended(metrics.step, metrics.num_tokens)

    def _rank(self, evaluation: Evaluation) -> tuple[bool, float]:
        keeps = evaluation.extra.get(FORGETTING, 0.0) <= self._plan.max_forgetting
        return not keeps, evaluation.loss

    def _sample(self, step: int) -> None:
        for sample in self._plan.sample() if self._plan.sample else ():
            self._log.note_sample(
                step,
                {
                    "prompt": sample.prompt.text,
                    "answer": sample.text,
                    "num_tokens": len(sample.tokens),
                    "has_ended": sample.has_ended,
                    "flaw": find_flaw(sample),
                },
            )

    def _raise_alarms(self, step: int) -> None:
        for alarm in find_alarms(self._steps, self._evaluations, max_forgetting=self._plan.max_forgetting):
            if alarm.kind in self._raised or not (alarm.kind in _ALWAYS_RAISED or self._plan.has_alarms):
                continue
            self._raised.add(alarm.kind)
            self._log.note("alarm", step, {"alarm": alarm.kind, "message": alarm.message})
            if alarm.is_fatal:
                raise TrainingDivergedError(alarm.message)
            self._listener.on_warning(alarm.message)


def _trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _read_history(log: RunLog) -> tuple[list[StepPoint], list[EvaluationPoint], set[AlarmKind]]:
    lines: list[dict[str, Any]] = log.lines()
    steps = [StepPoint(x["step"], x["train_loss"], x["gradient_norm"]) for x in lines if x["kind"] == "step"]
    evaluations = [
        EvaluationPoint(x["step"], x["valid_loss"], x["valid_accuracy"], x.get(FORGETTING))
        for x in lines
        if x["kind"] == "evaluation"
    ]
    return steps, evaluations, {x["alarm"] for x in lines if x["kind"] == "alarm"}
