"""Watching a run: which state is kept, when a run ends early, and that an interrupted run decides as another."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from adapters.chat_template import RenderedRow
from adapters.errors import TrainingDivergedError
from tests.support.conversations import easy_rows, make_dataset, make_messages
from tests.support.tiny import load_tiny_base
from training.config import TrainSettings
from training.lora import add_adapter
from training.losses import Evaluation, evaluate
from training.methods import TrainingRun
from training.methods.sft import train_sft
from training.progress import Checkpointing, NextMove, Reporter, StepMetrics, TrainedCounts
from training.rendering import render_dataset
from training.run_log import SAMPLES_FILE, RunLog, read_lines
from training.sampling import Sample, SamplePrompt
from training.watching import STATE_FILE, Watch, WatchPlan
from training.worker import SilentListener


@dataclass
class Listener(SilentListener):
    """Keeps what a watch tells."""

    evaluations: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """Keep one."""
        self.evaluations.append((metrics.step, evaluation.loss))

    def on_warning(self, message: str) -> None:
        """Keep one."""
        self.warnings.append(message)


class Losses:
    """Validation losses that are known beforehand; the model's one weight says after which of them it was."""

    def __init__(self, *losses: float) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self._losses = list(losses)
        self.num_asked = 0

    def measure(self) -> Evaluation:
        """The next of them."""
        loss = self._losses[self.num_asked]
        self.num_asked += 1
        self.model.weight.data.fill_(self.num_asked)
        return Evaluation(np.array([loss]), np.ones(1), extra={"margin": 0.5})


def _metrics(step: int, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(step, 100, loss, None, 10 * step)


def _watch(losses: Losses, folder: Path, listener: Listener | None = None, **plan: Any) -> Watch:
    given = WatchPlan(measure=losses.measure, **plan)
    return Watch(losses.model, given, log=RunLog(folder), listener=listener or Listener())


# Which state is kept --------------------------------------------------------------------------------------------------


def test_best_state_is_restored_when_later_ones_are_worse(tmp_path: Path) -> None:
    """The weights go back to where the validation loss was lowest; of equal losses the first counts."""
    losses = Losses(2.0, 1.0, 1.0, 1.5)
    watch = _watch(losses, tmp_path)
    for step in (10, 20, 30, 40):
        watch.evaluate(_metrics(step))
    assert losses.model.weight.item() == 4
    assert watch.restore_best() == 20
    assert losses.model.weight.item() == 2
    assert watch.best is not None
    assert (watch.best.step, watch.best.evaluation.loss) == (20, 1.0)


def test_remark_is_of_the_whole_run_when_it_went_on_in_another_process(tmp_path: Path) -> None:
    """By what the log knows of evaluations; without rows nothing is said, nor of losses that need not fall."""
    before = Evaluation(np.array([3.0]), np.ones(1))
    _watch(Losses(2.0), tmp_path).evaluate(_metrics(10))
    for has_alarms, expected in ((True, "by 1.000 since the evaluation before"), (False, None)):
        losses = Losses(1.0)
        plan = WatchPlan(measure=losses.measure, has_alarms=has_alarms)
        watch = Watch(losses.model, plan, log=RunLog(tmp_path, resume_step=10), listener=Listener())
        assert watch.remark(before) is None
        watch.evaluate(_metrics(20))
        assert (expected or "") in (watch.remark(before) or "")
        assert (expected is None) == (watch.remark(before) is None)
        assert watch.remark(None) is None


def test_last_state_is_left_when_nothing_was_validated(tmp_path: Path) -> None:
    """Without rows there is no best; nothing is written beside a checkpoint either."""
    model = torch.nn.Linear(1, 1)
    watch = Watch(model, WatchPlan(), log=RunLog(tmp_path), listener=Listener())
    before = model.weight.clone()
    assert not watch.is_due(10, is_scheduled=True, is_last=True)
    assert watch.evaluate(_metrics(10)) is None
    assert watch.restore_best() is None
    watch.save(tmp_path)
    assert torch.equal(before, model.weight)
    assert not (tmp_path / STATE_FILE).exists()


def test_state_that_forgets_is_the_best_only_while_there_is_no_other(tmp_path: Path) -> None:
    """A lower validation loss does not make up for it; the alarm is raised once, and a resumed run decides alike."""
    losses, listener = Losses(3.0, 2.0, 1.0, 2.5), Listener()
    rises = iter([0.5, 0.1, 0.4, 0.2])
    watch = _watch(losses, tmp_path, listener, forgetting=lambda: next(rises), max_forgetting=0.2, patience=2)
    kept = []
    for step in (1, 2, 3):
        watch.evaluate(_metrics(step))
        assert watch.best is not None
        kept.append(watch.best.step)
    assert [1, 2, 2] == kept
    assert [] == listener.warnings  # alarms look at the steps, and there were none
    watch.on_step(_metrics(3))
    watch.on_step(_metrics(4))
    assert [True] == ["forgets what it knew" in message for message in listener.warnings]
    watch.save(tmp_path)
    resumed = _watch(losses, tmp_path / "resumed", forgetting=lambda: 0.2, max_forgetting=0.2, patience=2)
    resumed.load(tmp_path)
    resumed.evaluate(_metrics(4))
    assert resumed.best is not None
    assert (2, {"margin": 0.5, "forgetting": 0.1}) == (resumed.best.step, dict(resumed.best.evaluation.extra))
    assert resumed.ended_at is not None


def test_forgetting_is_told_when_the_loss_need_not_fall(tmp_path: Path) -> None:
    """Rewarded runs have no alarms about their loss; what a model has forgotten counts for them as for others."""
    listener = Listener()
    watch = _watch(Losses(1.0), tmp_path, listener, forgetting=lambda: 0.5, max_forgetting=0.2, has_alarms=False)
    watch.evaluate(_metrics(1))
    watch.on_step(_metrics(2))
    assert ["forgetting"] == [
        line["alarm"] for line in RunLog(tmp_path, resume_step=2).lines() if line["kind"] == "alarm"
    ]
    assert ["forgets what it knew" in message for message in listener.warnings] == [True]


@pytest.mark.parametrize(
    ("eval_steps", "scheduled", "expected"), [(None, {4, 8}, [4, 8, 9]), (3, {4, 8}, [3, 6, 9]), (5, set(), [5, 9])]
)
def test_validation_is_due_by_the_step_alone(
    tmp_path: Path, eval_steps: int | None, scheduled: set[int], expected: list[int]
) -> None:
    """Where a checkpoint is, or at a distance of its own; the last step always."""
    watch = _watch(Losses(), tmp_path, eval_steps=eval_steps)
    due = [step for step in range(1, 10) if watch.is_due(step, is_scheduled=step in scheduled, is_last=step == 9)]
    assert expected == due


def test_run_ends_early_when_patience_runs_out(tmp_path: Path) -> None:
    """Counted from the best: a better loss in between gives all of it again."""
    watch = _watch(Losses(2.0, 2.1, 1.9, 2.0, 1.95), tmp_path, patience=2)
    ended = []
    for step in range(1, 6):
        watch.evaluate(_metrics(step))
        ended.append(watch.ended_at is not None)
    assert ended == [False, False, False, False, True]
    assert watch.ended_at is not None
    assert (watch.ended_at.step, watch.ended_at.num_tokens) == (5, 50)


def test_state_is_the_same_when_it_was_saved_and_loaded(tmp_path: Path) -> None:
    """Best weights, losses and patience go on as if nothing had happened."""
    losses = Losses(2.0, 1.0, 1.5)
    first = _watch(losses, tmp_path / "first", patience=2)
    for step in (1, 2, 3):
        first.evaluate(_metrics(step))
    first.save(tmp_path)
    other = Losses(1.4)
    second = _watch(other, tmp_path / "second", patience=2)
    second.load(tmp_path)
    second.evaluate(_metrics(4))
    assert second.ended_at is not None
    assert second.restore_best() == 2
    assert other.model.weight.item() == 2
    assert first.best is not None
    assert second.best is not None
    assert (first.best.evaluation.loss, first.best.evaluation.extra) == (1.0, second.best.evaluation.extra)
    second.save(tmp_path)
    third = _watch(Losses(), tmp_path / "third")
    third.load(tmp_path)
    assert third.ended_at == second.ended_at
    third.load(tmp_path / "third")  # a checkpoint without a state changes nothing
    assert third.restore_best() == 2


# What is written down and said ----------------------------------------------------------------------------------------


def test_everything_is_written_down_when_a_run_is_watched(tmp_path: Path) -> None:
    """Steps, validations and answers, each with its step."""
    listener = Listener()
    sample = Sample(SamplePrompt("Why?", (1, 2), 5), "", (), has_ended=True)
    watch = _watch(Losses(1.5), tmp_path, listener, sample=lambda: [sample])
    watch.on_step(StepMetrics(7, 9, 2.5, 0.25, 70, {"kl": 0.1}, learning_rate=1e-3, gradient_norm=3.0))
    watch.evaluate(_metrics(7))
    step, evaluation = RunLog(tmp_path, resume_step=9).lines()
    assert step == {
        "kind": "step",
        "step": 7,
        "num_steps": 9,
        "train_loss": 2.5,
        "train_accuracy": 0.25,
        "num_tokens": 70,
        "learning_rate": 1e-3,
        "gradient_norm": 3.0,
        "kl": 0.1,
    }
    assert evaluation == {"kind": "evaluation", "step": 7, "valid_loss": 1.5, "valid_accuracy": None, "margin": 0.5}
    assert list(read_lines(tmp_path / SAMPLES_FILE)) == [
        {"step": 7, "prompt": "Why?", "answer": "", "num_tokens": 0, "has_ended": True, "flaw": "empty"}
    ]
    assert listener.evaluations == [(7, 1.5)]


def test_run_is_stopped_when_a_loss_is_not_a_number(tmp_path: Path) -> None:
    """The reason is in the error and in the log, also for losses that need not fall."""
    watch = _watch(Losses(), tmp_path, has_alarms=False)
    with pytest.raises(TrainingDivergedError, match="the training loss is not a number at step 1"):
        watch.on_step(_metrics(1, math.nan))
    assert [line["kind"] for line in RunLog(tmp_path, resume_step=1).lines()] == ["step", "alarm"]


def test_warning_is_given_once_when_it_holds_for_many_steps(tmp_path: Path) -> None:
    """Also by a run that went on from behind it; a loss that need not fall has none."""
    listener, resumed, quiet = Listener(), Listener(), Listener()
    watch = _watch(Losses(), tmp_path, listener)
    for step in range(1, 45):
        watch.on_step(_metrics(step, 2.0))
    log = RunLog(tmp_path, resume_step=44)
    again = Watch(torch.nn.Linear(1, 1), WatchPlan(), log=log, listener=resumed)
    again.on_step(_metrics(45, 2.0))
    silent = _watch(Losses(), tmp_path / "rl", quiet, has_alarms=False)
    for step in range(1, 45):
        silent.on_step(_metrics(step, 2.0))
    assert [len(told.warnings) for told in (listener, resumed, quiet)] == [1, 0, 0]
    assert "nothing is learned" in listener.warnings[0]


# In a real run --------------------------------------------------------------------------------------------------------


@dataclass
class Stopping:
    """Pauses a run after a step, and keeps the steps of its checkpoints."""

    after: int = 0
    num_asked: int = 0
    checkpoints: list[tuple[int, bool]] = field(default_factory=list)

    def next_move(self) -> NextMove:
        """Asked once a step."""
        self.num_asked += 1
        return "pause" if self.num_asked == self.after else "continue"

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Not needed."""

    def on_checkpoint(self, metrics: StepMetrics, validation: Evaluation | None) -> None:
        """Keep the step, and whether it was validated."""
        self.checkpoints.append((metrics.step, validation is not None))


@dataclass
class Outcome:
    """What a run left."""

    counts: TrainedCounts
    listener: Listener
    best_step: int | None
    tensors: dict[str, torch.Tensor]
    watch: Watch


def _run(
    root: Path, base_folder: Path, watcher: Stopping, *, resume_from: int | None = None, patience: int | None = None
) -> Outcome:
    """Nine steps on ten easy rows, validated on rows that say the opposite: the loss there rises soon."""
    base = load_tiny_base(base_folder)
    settings = TrainSettings.load(root, rank=4, alpha=8, batch_size=4, epochs=3, learning_rate=2e-2, warmup_steps=1)
    rows: list[RenderedRow] = render_dataset(
        base.tokenizer, make_dataset(root / "rows.jsonl", easy_rows(10)), max_length=64
    )
    opposite = [make_messages(f"Q{number}", "Nothing of the kind.") for number in range(8)]
    validation = render_dataset(base.tokenizer, make_dataset(root / "valid.jsonl", opposite), max_length=64)
    model = add_adapter(base, settings)
    folder, listener = root / "checkpoints", Listener()
    pad = base.tokenizer.pad_token_id
    plan = WatchPlan(
        measure=lambda: evaluate(base.model, validation, batch_size=4, pad_token_id=pad),
        eval_steps=2,
        patience=patience,
    )
    watch = Watch(model, plan, log=RunLog(root / "log", resume_step=resume_from or 0), listener=listener)
    start = None if resume_from is None else folder / f"checkpoint-{resume_from}"
    keeping = Checkpointing(folder, watcher, 3, start)
    counts = train_sft(TrainingRun(model, base, rows, settings, listener, keeping, watch))
    best_step = watch.restore_best()
    tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    return Outcome(counts, listener, best_step, tensors, watch)


def test_interrupted_run_keeps_the_same_best_state_when_it_goes_on(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Paused on a step that is validated, and on one that is not: same validations, same best, same weights."""
    whole = _run(tmp_path / "whole", tiny_folders["llama"], Stopping())
    assert [step for step, _ in whole.listener.evaluations] == [2, 4, 6, 8, 9]
    assert whole.best_step is not None
    assert whole.best_step < 9  # or the last state would be the best anyhow
    for stop in (4, 5):
        root = tmp_path / str(stop)
        first = _run(root, tiny_folders["llama"], watcher := Stopping(stop))
        assert not first.counts.is_complete
        assert watcher.checkpoints == [(3, False), (stop, stop % 2 == 0)]
        second = _run(root, tiny_folders["llama"], Stopping(), resume_from=stop)
        assert whole.listener.evaluations == first.listener.evaluations + second.listener.evaluations
        assert (whole.best_step, whole.counts) == (second.best_step, second.counts)
        assert [line["step"] for line in RunLog(root / "log", resume_step=9).lines() if line["kind"] == "step"] == list(
            range(1, 10)
        )
        for name, expected in whole.tensors.items():
            assert torch.equal(expected, second.tensors[name]), name


def test_run_is_complete_when_patience_ended_it(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """It stops before its last step, with a checkpoint; going on from that one takes no further step."""
    first = _run(tmp_path, tiny_folders["llama"], watcher := Stopping(), patience=1)
    assert first.counts.is_complete
    assert first.counts.num_steps < 9
    assert watcher.checkpoints[-1] == (first.counts.num_steps, True)
    again = _run(tmp_path, tiny_folders["llama"], Stopping(), resume_from=first.counts.num_steps, patience=1)
    assert (first.counts, first.best_step) == (again.counts, again.best_step)
    assert again.listener.evaluations == []
    for name, expected in first.tensors.items():
        assert torch.equal(expected, again.tensors[name]), name


# Who is told ----------------------------------------------------------------------------------------------------------


class _Steps:
    """A listener of steps, which does nothing with them."""

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Of no interest."""


def test_trackers_are_told_of_a_validation_when_it_was_made(tmp_path: Path) -> None:
    """Under the trainer's names for it, at the step where it was made and at no other."""
    told: list[dict[str, float]] = []
    watch = _watch(Losses(2.0, 1.5), tmp_path, eval_steps=2)
    reporter = Reporter(_Steps(), lambda logs: (None, {}), None, watch, told.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for step in (1, 2, 3, 4):
        state = TrainerState(global_step=step, max_steps=4, epoch=0.5, num_input_tokens_seen=step)
        control = TrainerControl()
        reporter.on_step_end(arguments, state, control)
        reporter.on_log(arguments, state, control, logs={"loss": 1.0})
    assert [{"eval_loss": 2.0, "eval_margin": 0.5}, {"eval_loss": 1.5, "eval_margin": 0.5}] == told


def test_scores_are_kept_when_a_state_is_saved_and_loaded(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint is judged by the scores of its best state, as one that was let alone."""
    model = torch.nn.Linear(1, 1)
    scored = Evaluation(np.zeros(2), np.ones(2), scores=np.array([1.0, 0.5]))
    watch = Watch(model, WatchPlan(measure=lambda: scored), log=RunLog(tmp_path), listener=Listener())
    watch.evaluate(_metrics(1))
    watch.save(tmp_path)
    other = Watch(model, WatchPlan(), log=RunLog(tmp_path / "other"), listener=Listener())
    other.load(tmp_path)
    assert other.best is not None
    assert other.best.evaluation.scores is not None
    assert [1.0, 0.5] == other.best.evaluation.scores.tolist()
