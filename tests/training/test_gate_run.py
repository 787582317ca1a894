"""The gate in whole runs on a tiny base model: what is measured, what is recorded, and where the alias points then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters.adapter_files import read_adapter_config
from adapters.base_model import load_base
from adapters.database import open_database
from adapters.errors import NotFoundError
from adapters.registry import Registry
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from tests.support.conversations import easy_rows, make_messages, write_rows
from tests.support.tiny import tiny_settings
from training.config import TrainSettings
from training.evaluation import Yardstick
from training.forgetting import Forgetting
from training.formats import read_dataset
from training.gate_evidence import gather_evidence
from training.lora import add_adapter, disable_packed_kernels
from training.losses import evaluate
from training.methods import TrainingRun
from training.plots import CURVES_FILE
from training.rendering import render_dataset
from training.run_log import METRICS_FILE, SAMPLES_FILE, read_lines
from training.sampling import SamplePrompt
from training.start import read_version
from training.worker import SilentListener, TrainingResult, run_training

Rows = list[list[dict[str, str]]]

LEARNABLE: Rows = [make_messages(f"V{number}", "Yes!") for number in range(8)]
OPPOSITE: Rows = [make_messages(f"Q{number}", "Nothing of the kind.") for number in range(8)]


@dataclass
class Home:
    """A home folder over a tiny base model, which forgets and babbles as it likes: only losses are judged."""

    core: CoreSettings
    root: Path
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "rank": 4,
            "alpha": 8,
            "batch_size": 4,
            "epochs": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "max_length": 64,
            "gate_forgetting": 100,
            "gate_samples": 0,
            "sample_prompts": 0,
        }
    )

    def run(
        self, validation: Rows | None = None, listener: SilentListener | None = None, **settings: Any
    ) -> TrainingResult:
        """Train and publish under `legal`."""
        train_path = write_rows(self.root / "train.jsonl", easy_rows(10))
        path = write_rows(self.root / "valid.jsonl", validation) if validation else None
        resolved = TrainSettings.load(self.core.home, **self.settings | settings)
        return run_training("legal", train_path, path, core=self.core, settings=resolved, listener=listener)

    def registry(self) -> Registry:
        """What runs publish to."""
        database = open_database(self.core.resolved_database_url)
        return Registry(database, ArtifactStore(self.core.home / "store"))


@pytest.fixture
def home(tmp_path: Path, tiny_folders: dict[str, Path]) -> Home:
    """An empty one."""
    return Home(tiny_settings(tiny_folders["llama"], home=tmp_path / "home"), tmp_path)


def _live(home: Home) -> int | None:
    registry = home.registry()
    with closing(registry.database):
        try:
            return registry.alias("legal").current.number
        except NotFoundError:
            return None


# Where the alias points -----------------------------------------------------------------------------------------------


def test_alias_moves_when_each_version_is_better_than_the_one_before(home: Home) -> None:
    """The first is compared with the base, the second with the first, too; the report names its digest."""
    first = home.run(LEARNABLE, max_steps=3)
    second = home.run(LEARNABLE, epochs=8)
    assert (first.is_live, first.gate.verdict, first.gate.compared_with) == (True, "passed", None)
    assert (second.is_live, second.gate.verdict, _live(home)) == (True, "passed", 2)
    assert second.gate.compared_with == first.published.version.digest
    (present,) = [check for check in second.gate.checks if check.name == "present"]
    assert present.figures["other_loss"] == pytest.approx(first.validation_loss_after, abs=1e-4)
    assert present.figures["loss"] == pytest.approx(second.validation_loss_after, abs=1e-4)


def test_alias_stays_when_a_version_is_not_better_than_the_present_one(home: Home) -> None:
    """It is published all the same, and moves the alias only when told to always."""
    home.run(LEARNABLE, epochs=4)
    second = home.run(LEARNABLE, epochs=4, seed=1, gate_margin=1.0)
    assert (second.is_live, second.gate.verdict, _live(home)) == (False, "failed", 1)
    registry = home.registry()
    with closing(registry.database):
        assert registry.resolve("legal@v2", unit="anybody").digest == second.published.version.digest
        assert registry.store.verify(second.published.version.digest).gate == second.gate
    assert home.run(LEARNABLE, epochs=4, seed=2, gate_margin=1.0, promote="always").is_live


def test_alias_points_nowhere_when_its_first_version_fails(home: Home) -> None:
    """A version that has not earned the name answers by its own only; by hand it can be promoted."""
    first = home.run(LEARNABLE, gate_forgetting=0)
    assert (first.is_live, first.gate.verdict, _live(home)) == (False, "failed", None)
    assert "loss on general text" in first.gate.reason
    registry = home.registry()
    with closing(registry.database):
        assert registry.find("legal@v1").version.digest == first.published.version.digest
        assert registry.promote("legal@v1").current.number == 1


def test_alias_is_taken_but_not_moved_when_there_is_nothing_to_validate_on(home: Home) -> None:
    """Missing data is no success: a version without it takes a free name, and replaces nobody."""
    first, second = home.run(), home.run(seed=1)
    assert (first.is_live, first.gate.verdict) == (True, "inconclusive")
    assert (second.is_live, second.gate.verdict, _live(home)) == (False, "inconclusive", 1)
    assert "there is no validation file" in second.gate.reason


def test_alias_stays_when_it_must_never_move(home: Home) -> None:
    """However good the version is."""
    result = home.run(LEARNABLE, epochs=8, promote="never")
    assert (result.gate.verdict, result.is_live, _live(home)) == ("passed", False, None)


@dataclass
class AtPublishing(SilentListener):
    """Does something when the gate has spoken, and the version is not yet published."""

    act: Callable[[], Any]

    def on_stage(self, message: str) -> None:
        """Act."""
        if message == "Publishing":
            self.act()


def test_alias_stays_when_it_moved_since_the_gate_compared(home: Home) -> None:
    """The version was compared with the first, and the second has taken its place meanwhile."""
    home.run(LEARNABLE, max_steps=2)
    home.run(LEARNABLE, max_steps=3, promote="never")

    def promote_second() -> None:
        registry = home.registry()
        with closing(registry.database):
            registry.promote("legal@v2")

    third = home.run(LEARNABLE, AtPublishing(promote_second), epochs=8)
    assert (third.gate.verdict, third.is_live, _live(home)) == ("passed", False, 2)


def test_version_is_the_same_when_it_is_trained_again(home: Home) -> None:
    """What the alias answers with already keeps its report, and so its digest and number."""
    first, again = home.run(LEARNABLE), home.run(LEARNABLE)
    assert first.published == again.published
    assert (again.is_live, first.gate) == (True, again.gate)


def test_version_is_judged_again_when_its_bytes_are_the_same_under_other_settings_of_the_gate(home: Home) -> None:
    """The report is of the settings beside which it stands: nothing is as much better than itself as they ask."""
    first = home.run(LEARNABLE, epochs=4)
    again = home.run(LEARNABLE, epochs=4, gate_margin=0.5)
    registry = home.registry()
    with closing(registry.database):
        manifests = [registry.store.verify(result.published.version.digest) for result in (first, again)]
    assert manifests[0].files == manifests[1].files
    assert manifests[1].settings["gate_margin"] == 0.5
    assert (first.gate.verdict, again.gate.verdict, again.is_live) == ("passed", "failed", False)
    assert again.gate.compared_with == first.published.version.digest


# Methods with scores --------------------------------------------------------------------------------------------------

_PAIRS = [{"prompt": f"Q{number}?", "chosen": "Yes!", "rejected": "No no"} for number in range(12)]
_FLIPPED = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in _PAIRS]


def _train(home: Home, method: str, rows: list[Any], validation: list[Any], **settings: Any) -> TrainingResult:
    paths = [write_rows(home.root / f"{name}.jsonl", found) for name, found in (("t", rows), ("v", validation))]
    unused = {"gate_forgetting", "gate_samples", "sample_prompts"} if method == "reward" else set()
    given = {name: value for name, value in home.settings.items() if name not in unused} | settings
    resolved = TrainSettings.load(home.core.home, method=method, **given | {"max_length": 128})
    return run_training("tone", paths[0], paths[1], core=home.core, settings=resolved)


def test_reward_model_earns_its_alias_when_it_orders_validation_pairs(home: Home) -> None:
    """A head that gives every answer the same is right by half; who has learned the opposite replaces nobody."""
    learned = _train(home, "reward", _PAIRS, _PAIRS, epochs=4)
    misled = _train(home, "reward", _PAIRS, _FLIPPED, epochs=4, seed=1)

    assert ("passed", True) == (learned.gate.verdict, learned.is_live)
    (check,) = [check for check in learned.gate.checks if check.name == "base"]
    assert (1.0, 0.5) == (check.figures["pair_accuracy"], check.figures["other_pair_accuracy"])
    assert ("failed", False) == (misled.gate.verdict, misled.is_live)
    assert "share of validation pairs in the right order" in misled.gate.reason
    assert "of tone@v1" in misled.gate.reason


def test_rewarded_version_earns_its_alias_when_its_answers_get_more_reward(home: Home) -> None:
    """By a function of one's own: small letters are liked, and the mean over validation prompts must rise."""
    (home.root / "toy.py").write_text(
        "def small(completions, prompts, references):\n"
        "    return [sum('a' <= c <= 'z' for c in text) / max(1, len(text)) for text in completions]\n"
    )
    rows = [{"messages": row} for row in easy_rows(12)]
    options = {"reward": f"{home.root}/toy.py:small", "max_answer_tokens": 4, "batch_size": 8, "beta": 0}

    learned = _train(home, "rloo", rows, rows, epochs=4, **options)
    idle = _train(home, "rloo", rows, rows, max_steps=1, learning_rate=1e-9, **options)

    (check,) = [check for check in learned.gate.checks if check.name == "base"]
    assert check.sentence.startswith("mean reward of answers to validation prompts ")
    assert check.figures["mean_reward"] > check.figures["other_mean_reward"] + 0.1
    assert ("passed", True) == (learned.gate.verdict, learned.is_live)
    assert ("failed", False) == (idle.gate.verdict, idle.is_live)


# What is published and written down -----------------------------------------------------------------------------------


def test_best_state_is_published_when_the_last_one_is_worse(home: Home) -> None:
    """The files hold the state of the step that the manifest names, with the loss that was measured there."""
    result = home.run(OPPOSITE, epochs=4, eval_steps=1, learning_rate=2e-2)
    assert result.best_step is not None
    assert result.best_step < result.num_steps
    lines = list(read_lines(result.folder / METRICS_FILE))
    losses = {line["step"]: line["valid_loss"] for line in lines if line["kind"] == "evaluation"}
    assert min(losses, key=lambda step: losses[step]) == result.best_step
    base = load_base(home.core)
    loaded = PeftModel.from_pretrained(base.model, home.core.home / "store" / result.published.version.digest)
    rows = render_dataset(base.tokenizer, read_dataset(home.root / "valid.jsonl"), max_length=64)
    found = evaluate(loaded.get_base_model(), rows, batch_size=4, pad_token_id=base.tokenizer.pad_token_id)
    assert found.loss == pytest.approx(losses[result.best_step], rel=1e-5)
    assert found.loss < losses[result.num_steps] - 0.01


def test_state_that_forgets_is_passed_over_when_another_remembers(home: Home) -> None:
    """The limit lies between what two validations of one run found: the state below it is published, and passes."""
    free = home.run(LEARNABLE, max_steps=6, eval_steps=3, promote="never", learning_rate=0.1)
    points = [x for x in read_lines(free.folder / METRICS_FILE) if x["kind"] == "evaluation"]
    forgets, keeps = sorted(points, key=lambda x: x["valid_loss"])
    assert keeps["forgetting"] < forgets["forgetting"]
    limit = (keeps["forgetting"] + forgets["forgetting"]) / 2
    held = home.run(LEARNABLE, max_steps=6, eval_steps=3, learning_rate=0.1, gate_forgetting=limit)
    (check,) = [check for check in held.gate.checks if check.name == "forgetting"]
    assert (free.best_step, held.best_step, check.outcome) == (forgets["step"], keeps["step"], "passed")
    assert check.figures["rise"] == pytest.approx(keeps["forgetting"], abs=1e-3)
    assert "alarm" in [line["kind"] for line in read_lines(held.folder / METRICS_FILE)]


def test_forgetting_is_not_measured_again_when_a_validation_has(
    home: Home, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate takes the best validation's, which is that of the state it judges; of a run without one it measures."""
    measured: list[float] = []
    measure = Forgetting.measure

    def count(self: Forgetting) -> float:
        measured.append(measure(self))
        return measured[-1]

    monkeypatch.setattr(Forgetting, "measure", count)
    validated = home.run(LEARNABLE, max_steps=6, eval_steps=3)
    base_loss, *of_validations = measured[1], measured[0], *measured[2:]
    assert 2 == len(of_validations)
    rises = [line["forgetting"] for line in read_lines(validated.folder / METRICS_FILE) if line["kind"] == "evaluation"]
    assert rises == pytest.approx([loss - base_loss for loss in of_validations])
    (check,) = [check for check in validated.gate.checks if check.name == "forgetting"]
    assert validated.best_step is not None
    assert check.figures["rise"] == pytest.approx(rises[validated.best_step // 3 - 1], abs=1e-3)
    measured.clear()
    unvalidated = home.run(max_steps=6)
    (check,) = [check for check in unvalidated.gate.checks if check.name == "forgetting"]
    assert measured == pytest.approx([check.figures["loss"]], abs=1e-3)


def test_run_leaves_its_files_when_it_is_done(home: Home) -> None:
    """Metrics of every step, validations, the gate's word, answers of every validation, and curves."""
    result = home.run(LEARNABLE, sample_prompts=2, sample_tokens=4)
    assert result.folder.parent == home.core.home / "runs"
    kinds = [line["kind"] for line in read_lines(result.folder / METRICS_FILE)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"step": 6, "evaluation": 2, "gate": 1}
    samples = list(read_lines(result.folder / SAMPLES_FILE))
    assert [(line["step"], line["prompt"]) for line in samples] == [(3, "V0"), (3, "V1"), (6, "V0"), (6, "V1")]
    assert "<polyline" in (result.folder / CURVES_FILE).read_text()


def test_answers_are_judged_when_they_are_sampled(home: Home) -> None:
    """The trained model's own: after enough steps it says nothing but what it was taught."""
    result = home.run(LEARNABLE, epochs=12, gate_samples=4, gate_format_regex=r"Yes!.*")
    outcomes = {check.name: check.outcome for check in result.gate.checks}
    assert outcomes == dict.fromkeys(("base", "forgetting", "sampling", "format"), "passed")


# The yardstick --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_yardstick_measures_a_version_as_plain_peft_does(
    home: Home, tiny_folders: dict[str, Path], quantisation: str
) -> None:
    """A published version and the bare base, beside an adapter in training, which is what it was afterwards."""
    home.core = tiny_settings(tiny_folders["llama"], home=home.root / quantisation, quantisation=quantisation)
    result = home.run(LEARNABLE)
    base = load_base(home.core)
    settings = TrainSettings.load(home.core.home, **home.settings, seed=5, init="gaussian")
    model = add_adapter(base, settings)
    rows = render_dataset(base.tokenizer, read_dataset(home.root / "valid.jsonl"), max_length=64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)

    def measure() -> Any:
        return evaluate(base.model, rows, batch_size=4, pad_token_id=base.tokenizer.pad_token_id)

    run = TrainingRun(model, base, rows, settings.model_copy(update={"start_from": "legal"}), SilentListener())
    before = measure()
    yardstick = Yardstick(run, measure, before)
    registry = home.registry()
    with closing(registry.database):
        version = read_version(registry, "legal@v1", base)
    found = {"version": yardstick.measure_version(version).loss, "base": yardstick.measure_base().loss}
    assert measure().loss == before.loss
    assert [parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name] == [True] * 28

    plain = load_base(home.core)
    disable_packed_kernels(plain.model)
    options = {"batch_size": 4, "pad_token_id": base.tokenizer.pad_token_id}
    # Four bits compute in bfloat16, and padded batches round otherwise than flat ones.
    exactness = 1e-5 if quantisation == "none" else 2e-3
    assert found["base"] == pytest.approx(evaluate(plain.model, rows, **options).loss, rel=exactness)
    folder = home.core.home / "store" / result.published.version.digest
    assert read_adapter_config(folder).r == 4
    loaded = PeftModel.from_pretrained(plain.model, folder).get_base_model()
    assert found["version"] == pytest.approx(evaluate(loaded, rows, **options).loss, rel=exactness)
    assert abs(found["version"] - found["base"]) > 0.1


def test_gradients_are_right_when_the_gate_has_measured(home: Home) -> None:
    """Evaluating and sampling repack nothing: a step behind them gives the gradients of a step without them."""
    core = home.core.model_copy(update={"quantisation": "nf4"})
    rows_path = write_rows(home.root / "train.jsonl", easy_rows(4))
    gradients: list[list[torch.Tensor]] = []
    for measures in (False, True):
        base = load_base(core)
        settings = TrainSettings.load(core.home, **home.settings)
        model = add_adapter(base, settings)
        rows = render_dataset(base.tokenizer, read_dataset(rows_path), max_length=64)
        batch = torch.tensor([rows[0].input_ids])
        if measures:
            _measure_everything(TrainingRun(model, base, rows, settings, SilentListener()))
        model.train()
        base.model(input_ids=batch, labels=batch).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 28
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def _measure_everything(run: TrainingRun[Any]) -> None:
    def measure() -> Any:
        return evaluate(run.base.model, run.rows, batch_size=4, pad_token_id=run.base.tokenizer.pad_token_id)

    prompts = [SamplePrompt("?", tuple(run.rows[0].input_ids[:9]), 3)]
    before = measure()
    gather_evidence(run, Yardstick(run, measure, before), candidate=before, present=None, prompts=prompts)
