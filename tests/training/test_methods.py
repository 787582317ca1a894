"""Every training method on tiny real models: it learns, its loss is its paper's, and it goes on bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.chat_template import RenderedRow
from tests.support.methods import TinyWatcher, keep, make_run, method_settings, trained_tensors
from tests.support.tiny import load_tiny_base
from training.estimate import count_steps
from training.length_order import grouped_order
from training.log_probs import answer_log_probs
from training.methods import METHODS, VALIDATORS, TrainingRun
from training.methods.kto import label_weights, mismatched_rows
from training.methods.rl import answer_greedily

COMPARING = ["dpo", "kto", "reward"]


def _run(tmp_path: Path, folder: Path, method: str, quantisation: str = "none", **changes: Any) -> TrainingRun[Any]:
    base = load_tiny_base(folder, quantisation=quantisation)
    return make_run(base, method_settings(tmp_path / "home", method, **changes), tmp_path)


def _shift(run: TrainingRun[Any]) -> None:
    """Give the adapter an effect, as that of a version that a run goes on from."""
    generator = torch.Generator().manual_seed(3)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def _log_prob(model: Any, row: RenderedRow) -> float:
    """Of the answer alone, written out from the logits of one row."""
    with torch.no_grad():
        log_probs = model(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
    marked = [index for index, carries_loss in enumerate(row.loss_mask) if carries_loss]
    return float(sum(log_probs[index - 1, row.input_ids[index]].item() for index in marked))


def _ratio(run: TrainingRun[Any], row: RenderedRow) -> float:
    """How much likelier the answer is than under the bare base model, as a difference of logarithms."""
    run.model.eval()
    ours = _log_prob(run.model, row)
    with run.model.disable_adapter():
        return ours - _log_prob(run.model, row)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# Learning.


@pytest.mark.parametrize("method", COMPARING)
def test_method_learns_when_rows_are_easy(tmp_path: Path, tiny_folders: dict[str, Path], method: str) -> None:
    """On a 4-bit base the loss falls, what is measured on the rows agrees, and no second adapter is left behind."""
    run = _run(tmp_path, tiny_folders["llama"], method, "nf4")
    validate = VALIDATORS[method](run, run.rows)
    before = validate()

    counts = METHODS[method](run)

    watcher = run.listener
    assert isinstance(watcher, TinyWatcher)
    assert counts.num_steps == len(watcher.losses) == 12
    assert counts.num_tokens > 0
    assert watcher.losses[-1] < 0.5 * watcher.losses[0]
    assert validate().loss < 0.5 * before.loss
    assert {value for name, value in validate().extra.items() if name.endswith("_accuracy")} == {1.0}
    assert set(run.model.peft_config) == {"default"}


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_reward_rises_when_answers_are_sampled(tmp_path: Path, tiny_folders: dict[str, Path], method: str) -> None:
    """The mean reward of sampled answers goes up; the copy that TRL makes for a reference is gone afterwards."""
    changes: dict[str, Any] = {"batch_size": 16, "generations": 8, "learning_rate": 3e-2, "epochs": 4}
    run = _run(tmp_path, tiny_folders["llama"], method, **changes)
    watcher = TinyWatcher()

    METHODS[method](keep(run, watcher, tmp_path / "checkpoints"))

    rewards = [metrics.extra["mean_reward"] for metrics in watcher.metrics]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > 1.2 * sum(rewards[:5])
    assert {"kl", "reward_std", "answer_tokens"} <= set(watcher.metrics[-1].extra)
    assert set(run.model.peft_config) == {"default"}


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_rl_is_held_to_nothing_when_beta_is_zero(tmp_path: Path, tiny_folders: dict[str, Path], method: str) -> None:
    """TRL then makes no copy of the adapter, and there is none to delete."""
    run = _run(tmp_path, tiny_folders["llama"], method, beta=0, max_answer_tokens=3, max_steps=1)
    watcher = TinyWatcher()

    METHODS[method](keep(run, watcher, tmp_path / "checkpoints"))

    assert [metrics.step for metrics in watcher.metrics] == [1]
    assert "kl" not in watcher.metrics[0].extra
    assert set(run.model.peft_config) == {"default"}


def test_rl_validation_is_the_mean_reward_of_likeliest_answers_when_measured(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """Lower is better for a loss, so that the reward's sign is turned."""
    run = _run(tmp_path, tiny_folders["llama"], "grpo")
    assert run.score is not None
    rewards = run.score(run.rows, [answer_greedily(run, prompt) for prompt in run.rows])

    found = VALIDATORS["grpo"](run, run.rows)()

    assert found.extra == {"mean_reward": pytest.approx(sum(rewards) / len(rewards))}
    assert found.loss == -found.extra["mean_reward"]


# The losses, and what they compare with.


@pytest.mark.parametrize("reference", ["base", "start"])
def test_dpo_compares_with_the_reference_that_was_said_when_it_begins(
    tmp_path: Path, tiny_folders: dict[str, Path], reference: str
) -> None:
    """The first loss is that of the paper, computed from the logits by hand; with itself the model is level."""
    changes: dict[str, Any] = {
        "start_from": "legal",
        "reference": reference,
        "beta": 0.3,
        "batch_size": 2,
        "max_steps": 1,
    }
    run = _run(tmp_path, tiny_folders["llama"], "dpo", **changes, learning_rate=1e-9)
    _shift(run)
    pairs = run.rows[:2]
    margins = [0.3 * (_ratio(run, pair.chosen) - _ratio(run, pair.rejected)) for pair in pairs]
    expected = sum(-math.log(_sigmoid(margin)) for margin in margins) / 2 if reference == "base" else math.log(2)
    watcher = TinyWatcher()

    METHODS["dpo"](keep(_only(run, 2), watcher, tmp_path / "checkpoints"))

    assert watcher.losses == [pytest.approx(expected, rel=1e-3)]
    assert watcher.metrics[0].extra["reward_margin"] == pytest.approx(
        sum(margins) / 2 if reference == "base" else 0, abs=1e-3
    )


def test_dpo_keeps_its_reference_when_the_model_moves(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Steps later the comparison is still with the version that the run started from."""
    run = _only(_run(tmp_path, tiny_folders["llama"], "dpo", start_from="legal", batch_size=2, max_steps=6), 2)
    _shift(run)
    options = {"batch_size": 2, "pad_token_id": run.base.tokenizer.pad_token_id}
    sides = [run.rows[0].chosen, run.rows[1].chosen]
    at_start = answer_log_probs(run.model, sides, **options)
    watcher = TinyWatcher(stop_after=5, move="stop")

    METHODS["dpo"](keep(run, watcher, tmp_path / "checkpoints"))

    # The weights that the last reported step was computed with were those before its update: one step less.
    before_last = TinyWatcher(stop_after=4, move="stop")
    other = _only(_run(tmp_path, tiny_folders["llama"], "dpo", start_from="legal", batch_size=2, max_steps=6), 2)
    _shift(other)
    METHODS["dpo"](keep(other, before_last, tmp_path / "other"))
    gains = answer_log_probs(other.model, sides, **options) - at_start
    assert gains.abs().max() > 0.1
    assert watcher.metrics[-1].extra["reward_chosen"] == pytest.approx(0.1 * gains.mean().item(), rel=1e-3)


def test_kto_compares_with_the_base_when_it_begins(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """The first loss is that of the paper, with the divergence of the mismatched rows, computed by hand."""
    changes: dict[str, Any] = {"start_from": "legal", "reference": "base", "beta": 0.3, "batch_size": 4, "max_steps": 1}
    run = _only(_run(tmp_path, tiny_folders["llama"], "kto", **changes, learning_rate=1e-9), 4)
    _shift(run)
    lengths = [len(row.row.input_ids) for row in run.rows]
    order = grouped_order(lengths, 4, torch.Generator().manual_seed(run.settings.seed))
    rows = [run.rows[number] for number in order]
    mismatched = mismatched_rows([row.row for row in rows], max_length=128)
    divergence = max(0.0, sum(_ratio(run, row) for row in mismatched) / 4)
    weight_good, weight_bad = label_weights([row.label for row in rows])
    expected = sum(
        (weight_good if row.label else weight_bad)
        * (1 - _sigmoid(0.3 * (_ratio(run, row.row) - divergence) * (1 if row.label else -1)))
        for row in rows
    )
    watcher = TinyWatcher()

    METHODS["kto"](keep(run, watcher, tmp_path / "checkpoints"))

    assert watcher.losses == [pytest.approx(expected / 4, rel=1e-3)]


def test_reward_loss_compares_scores_of_last_tokens_when_it_begins(
    tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """The first loss is that of Bradley and Terry over the head's product with the last hidden state."""
    run = _only(_run(tmp_path, tiny_folders["llama"], "reward", batch_size=2, max_steps=1, learning_rate=1e-9), 2)
    _shift(run)
    margins = [_score(run, pair.chosen) - _score(run, pair.rejected) for pair in run.rows]
    expected = sum(-math.log(_sigmoid(margin)) for margin in margins) / 2

    METHODS["reward"](run)

    assert run.listener.losses == [pytest.approx(expected, rel=1e-3)]  # type: ignore[attr-defined]


def _score(run: TrainingRun[Any], row: RenderedRow) -> float:
    assert run.head is not None
    decoder = run.base.model.get_decoder()
    with torch.no_grad():
        hidden = decoder(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0, -1]
    return float(hidden.float() @ run.head.weight[0].detach())


def _only(run: TrainingRun[Any], num_rows: int) -> TrainingRun[Any]:
    return replace(run, rows=run.rows[:num_rows])


# Weights of labels, and mismatched rows.


def test_labels_weigh_the_same_in_all_when_they_are_unequal() -> None:
    """Three good rows and one bad: the bad one counts three times."""
    assert label_weights([True, True, True, False]) == (1.0, 3.0)
    assert label_weights([True, False, False]) == (2.0, 1.0)
    assert label_weights([True, False]) == (1.0, 1.0)


def test_mismatched_rows_have_the_answer_before_them_when_they_are_made() -> None:
    """The first gets the last's, and what is too long is cut."""
    rows = [RenderedRow([1, 2, 10], [False, False, True]), RenderedRow([3, 20, 21], [False, True, True])]

    assert mismatched_rows(rows, max_length=3) == [
        RenderedRow([1, 2, 20], [False, False, True]),
        RenderedRow([3, 10], [False, True]),
    ]


# Interruptions, and what evaluation must leave alone.


@pytest.mark.parametrize("method", [*COMPARING, "grpo"])
def test_adapter_has_the_same_bits_when_the_run_was_interrupted(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str
) -> None:
    """Paused in the middle of an epoch and gone on from the checkpoint, reference, order and samples included."""
    changes: dict[str, Any] = {"epochs": 2, "max_answer_tokens": 3} if method == "grpo" else {"epochs": 2}

    def train(folder: str, watcher: TinyWatcher, resume_from: int | None = None) -> TrainingRun[Any]:
        run = _run(tmp_path, tiny_folders["llama"], method, **changes)
        run = keep(run, watcher, tmp_path / folder, resume_from)
        METHODS[method](run)
        return run

    whole = train("whole", TinyWatcher())
    train("parts", TinyWatcher(stop_after=2))
    watcher = TinyWatcher()
    resumed = train("parts", watcher, resume_from=2)

    assert watcher.metrics[0].step == 3
    expected = trained_tensors(whole)
    assert len(expected) > 10
    assert [name for name, found in trained_tensors(resumed).items() if not torch.equal(found, expected[name])] == []


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("rloo", {"generations": 2, "max_answer_tokens": 2}),
        ("grpo", {"generations": 2, "max_answer_tokens": 2, "gradient_accumulation": 2}),
        ("dpo", {}),
        ("kto", {}),
        ("reward", {"gradient_accumulation": 2}),
    ],
)
def test_run_takes_the_steps_that_its_estimate_counts_when_rows_are_left_over(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str, changes: dict[str, Any]
) -> None:
    """Seven rows fill no whole number of steps; answers are sampled for whole steps alone."""
    run = _run(tmp_path, tiny_folders["llama"], method, **changes, batch_size=4, epochs=2)
    run = _only(run, 7)
    watcher = TinyWatcher()
    METHODS[method](keep(run, watcher, tmp_path / "checkpoints"))
    assert count_steps(7, run.settings) == watcher.metrics[-1].step == watcher.metrics[-1].num_steps


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_prompts_come_in_the_same_order_when_the_run_was_interrupted_behind_its_first_epoch(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str
) -> None:
    """Each epoch has an order of its own, also where a run begins in or behind the second: every bit is the same."""

    def train(folder: str, watcher: TinyWatcher, resume_from: int | None = None) -> TrainingRun[Any]:
        changes: dict[str, Any] = {"epochs": 3, "generations": 2, "max_answer_tokens": 2}
        run = keep(
            _only(_run(tmp_path, tiny_folders["llama"], method, **changes), 8), watcher, tmp_path / folder, resume_from
        )
        METHODS[method](run)
        return run

    first = TinyWatcher()
    expected = trained_tensors(train("whole", first))
    assert first.metrics[-1].step == 6  # two steps an epoch
    for stop_after in (3, 4):
        folder = f"parts-{stop_after}"
        train(folder, TinyWatcher(stop_after=stop_after))
        watcher = TinyWatcher()
        found = trained_tensors(train(folder, watcher, resume_from=stop_after))
        assert watcher.metrics[0].step == stop_after + 1
        assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("method", COMPARING)
def test_method_gives_the_same_bits_when_the_seed_is_the_same(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str
) -> None:
    """And others with another seed."""
    found = []
    for seed in (5, 5, 6):
        run = _run(tmp_path, tiny_folders["llama"], method, "nf4", seed=seed, max_steps=3)
        METHODS[method](run)
        found.append(trained_tensors(run))

    first, again, other = found
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_gradients_stay_the_same_when_answers_were_sampled_between(tmp_path: Path, wide_folder: Path) -> None:
    """Generating and comparing put no layer of a 4-bit base out of the way of gradients."""
    run = _run(tmp_path, wide_folder, "grpo", "nf4")
    _shift(run)

    def gradient() -> torch.Tensor:
        ids = torch.tensor([run.rows[0].input_ids])
        run.model.train()
        loss = run.model(input_ids=ids, labels=ids).loss
        trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trained)])

    before = gradient()
    answer_greedily(run, run.rows[0])
    row = RenderedRow(run.rows[0].input_ids, [False] + [True] * (len(run.rows[0].input_ids) - 1))
    answer_log_probs(run.model, [row], batch_size=1, pad_token_id=0)

    assert torch.cosine_similarity(before, gradient(), dim=0).item() > 0.999


@pytest.mark.parametrize("method", ["sft", *COMPARING])
def test_weights_that_a_run_goes_on_from_are_not_rounded_when_the_base_has_four_bits(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str
) -> None:
    """A step too small to see leaves every weight where it was, with all of its bits but the last."""
    run = _run(tmp_path, tiny_folders["llama"], method, "nf4", max_steps=1, learning_rate=1e-9)
    _shift(run)
    before = trained_tensors(run)

    METHODS[method](run)

    for name, found in trained_tensors(run).items():
        torch.testing.assert_close(found, before[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_nobody_is_told_when_somebody_trains(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """TRL's trainers report each run to their makers; here they don't."""
    told: list[Any] = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    monkeypatch.delenv("CI", raising=False)

    METHODS[method](_run(tmp_path, tiny_folders["llama"], method, max_steps=1))

    assert told == []


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_method_takes_the_same_steps_when_activations_are_recomputed(
    tmp_path: Path, tiny_folders: dict[str, Path], method: str
) -> None:
    """Gradient checkpointing saves memory and changes no result."""
    losses = []
    for gradient_checkpointing in (False, True):
        run = _run(tmp_path, tiny_folders["llama"], method, max_steps=3, gradient_checkpointing=gradient_checkpointing)
        METHODS[method](run)
        losses.append(run.listener.losses)  # type: ignore[attr-defined]

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_every_method_has_what_measures_it_when_listed() -> None:
    """What trains and what validates are found by the same names."""
    assert set(METHODS) == set(VALIDATORS) == {"sft", "dpo", "kto", "reward", "rloo", "grpo"}
