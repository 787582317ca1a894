"""One run from a file to a published version: what it publishes and records, and what stops it before it starts."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapters.adapter_files import read_adapter_config, read_adapter_weights
from adapters.base_files import compute_fingerprint
from adapters.base_model import load_base, load_tokenizer, read_module_shapes
from adapters.chat_template import hash_chat_template
from adapters.database import open_database
from adapters.errors import (
    AdapterWeightsError,
    BaseModelError,
    ConfigurationError,
    DataError,
    InvalidNameError,
    OutOfMemoryError,
)
from adapters.manifest import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MANIFEST_FILE,
    DataReference,
    Manifest,
    hash_file,
)
from adapters.registry import Registry
from adapters.routing.store import load_prompts, read_sources
from adapters.settings import CoreSettings
from adapters.store import ArtifactStore
from tests.support.conversations import easy_rows, make_dataset, make_messages, write_rows
from tests.support.tiny import tiny_settings
from training.config import TrainSettings
from training.flat_rows import install_row_attention
from training.formats import read_dataset
from training.held_out import hold_out
from training.lora import add_adapter, disable_packed_kernels
from training.losses import Evaluation, evaluate
from training.methods import TrainingRun
from training.methods.sft import train_sft
from training.progress import StepMetrics
from training.rendering import render_dataset
from training.worker import SilentListener, TrainingResult, run_training

BASE = "org/tiny"  # as a model from the hub is named, so that its files lie in the home folder


@dataclass
class Recorder:
    """A listener that keeps what it is told."""

    stages: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def on_stage(self, message: str) -> None:
        """Keep one stage."""
        self.stages.append(message)

    def on_step(self, step: int, num_steps: int, loss: float) -> None:
        """Keep one step."""
        self.steps.append(step)

    def on_evaluation(self, metrics: StepMetrics, evaluation: Evaluation) -> None:
        """Keep one validation loss."""
        self.evaluations.append((metrics.step, evaluation.loss))

    def on_warning(self, message: str) -> None:
        """Keep one warning."""
        self.warnings.append(message)


@dataclass
class Workplace:
    """A home folder with a tiny base model in it, training files, and the settings of a run."""

    core: CoreSettings
    settings: TrainSettings
    train_path: Path
    validation_path: Path
    recorder: Recorder = field(default_factory=Recorder)

    def run(self, *, seed: int = 0, alias: str = "legal", promote: str = "always") -> TrainingResult:
        """Train and publish."""
        return run_training(
            alias,
            self.train_path,
            self.validation_path,
            core=self.core,
            settings=self.settings.model_copy(update={"seed": seed, "promote": promote}),
            listener=self.recorder,
        )

    @property
    def base_folder(self) -> Path:
        """Where the base model's files lie."""
        return self.core.home / "bases" / BASE.replace("/", "--")

    def registry(self) -> Registry:
        """What the run published to, opened anew."""
        return Registry(open_database(self.core.resolved_database_url), ArtifactStore(self.core.home / "store"))

    def published(self, result: TrainingResult) -> Path:
        """The folder of the version that a run made."""
        return self.core.home / "store" / result.published.version.digest


@dataclass
class Run:
    """A finished run and where it took place."""

    place: Workplace
    result: TrainingResult

    @property
    def folder(self) -> Path:
        """The published version."""
        return self.place.published(self.result)

    @property
    def manifest(self) -> Manifest:
        """The published version's manifest, every hash in it checked."""
        return ArtifactStore(self.folder.parent).verify(self.folder.name)


def _make_workplace(root: Path, tiny_folder: Path, quantisation: str = "none") -> Workplace:
    home = root / "home"
    shutil.copytree(tiny_folder, home / "bases" / BASE.replace("/", "--"))
    return Workplace(
        core=CoreSettings.load(home, base=BASE, device="cpu", quantisation=quantisation),
        settings=TrainSettings.load(
            home, rank=4, alpha=8, batch_size=4, epochs=2, learning_rate=1e-2, warmup_steps=1, max_length=64
        ),
        train_path=write_rows(root / "data" / "train.jsonl", easy_rows(10)),
        validation_path=write_rows(root / "data" / "valid.jsonl", [make_messages(f"V{n}", "Yes!") for n in range(3)]),
    )


@pytest.fixture
def place(tmp_path: Path, tiny_folders: dict[str, Path]) -> Workplace:
    """A home of its own for one test."""
    return _make_workplace(tmp_path, tiny_folders["llama"])


@pytest.fixture(scope="module", params=["none", "nf4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Run:
    """One run on a base in each precision, which tests look at and leave as it is."""
    place = _make_workplace(tmp_path_factory.mktemp("run"), tiny_folders["llama"], request.param)
    return Run(place, place.run())


# What a run publishes.


def test_run_training_publishes_version_one_when_the_alias_is_new(run: Run) -> None:
    """The result, the registry and the store agree on what was published, and the alias points to it."""
    registry = run.place.registry()

    assert (run.result.published.alias, run.result.published.number, run.result.is_live) == ("legal", 1, True)
    assert run.result.published == registry.alias("legal").current
    assert run.result.published.version.digest == registry.resolve("legal", unit="anybody").digest
    assert {run.result.published.version.digest} == registry.store.digests()
    registry.database.close()


def test_run_training_counts_rows_and_steps_when_it_is_done(run: Run) -> None:
    """Ten rows in batches of four, twice, are six steps."""
    assert (run.result.num_rows, run.result.num_steps) == (10, 6)
    assert list(range(1, 7)) == run.place.recorder.steps
    assert run.result.train_seconds > 0
    assert run.result.tokens_per_second > 0


def test_run_training_lowers_the_validation_loss_when_rows_are_easy(run: Run) -> None:
    """The loss on rows that were not trained on is measured on both sides of the training."""
    assert run.result.validation_loss_before is not None
    assert run.result.validation_loss_after is not None
    assert 0 < run.result.validation_loss_after < 0.7 * run.result.validation_loss_before


def test_run_training_says_that_more_epochs_would_pay_when_the_loss_still_fell(run: Run) -> None:
    """In the result, for its end; jobs have an event instead."""
    evaluations = run.place.recorder.evaluations
    fell = f"to {evaluations[-1][1]:.3f}: by {evaluations[-2][1] - evaluations[-1][1]:.3f} since the evaluation before"
    assert f"the validation loss was still falling at the last step, {fell}; training longer would probably pay" == (
        run.result.remark
    )
    assert run.result.remark not in run.place.recorder.warnings


def test_run_training_tells_the_warnings_of_the_preflight_when_somebody_listens(run: Run) -> None:
    """What the data's owner should know is told in the words of the preflight, before the model is loaded."""
    path = run.place.validation_path

    few = "rows to validate with: 3; the gate compares with 8 or more and will be inconclusive: give more"
    assert f"{path}: {few}" in run.place.recorder.warnings


def test_run_training_tells_its_stages_when_somebody_listens(run: Run) -> None:
    """A person who watches sees the data checked before the base model is loaded, and publishing last."""
    quantisation = run.place.core.quantisation

    assert [
        "Checking the data",
        f"Tokenising for the base model {BASE}",
        f"Loading the base model {BASE} ({quantisation})",
        "Validation loss before training",
        "Training on 10 rows",
        "Checking the version against the gate",
        "Publishing",
    ] == run.place.recorder.stages


def test_manifest_records_where_a_version_comes_from_when_it_was_trained(run: Run) -> None:
    """Base, data, settings, results and libraries: enough to make the version again."""
    place, manifest = run.place, run.manifest

    quantisation = place.core.quantisation
    assert manifest.source == "trained"
    assert {
        "name": BASE,
        "fingerprint": compute_fingerprint(place.base_folder, quantisation=quantisation),
        "quantisation": quantisation,
    } == manifest.base.model_dump()
    assert manifest.data is not None
    assert {
        "train_sha256": hash_file(place.train_path),
        "num_train_rows": 10,
        "validation_sha256": hash_file(place.validation_path),
        "num_validation_rows": 3,
        "validation_share": None,
    } == manifest.data.model_dump()
    assert ("chat", "sft", None) == (manifest.kind, manifest.method, manifest.parent)
    recorded = place.settings.model_dump(
        mode="json", exclude={"home", "keep_prompts", "promote", "sample_file", "validation_share"}
    )
    assert recorded == manifest.settings
    (forgetting,) = [check for check in run.result.gate.checks if check.name == "forgetting"]
    assert {
        "validation_loss_before": run.result.validation_loss_before,
        "validation_loss_after": run.result.validation_loss_after,
        "validation_accuracy_after": run.result.validation_accuracy_after,
        "validation_forgetting_after": pytest.approx(forgetting.figures["rise"], abs=1e-3),
        "num_steps": 6,
        "best_step": 6,
    } == manifest.metrics
    assert hash_chat_template(load_tokenizer(place.base_folder)) == manifest.chat_template_sha256
    assert version("torch") == manifest.libraries["torch"]
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "python"} <= set(manifest.libraries)


def test_prompts_are_kept_beside_the_version_when_it_is_published(run: Run) -> None:
    """What users say in the training rows, for the router."""
    said = {message["content"] for row in easy_rows(10) for message in row if message["role"] == "user"}
    with run.place.registry().database.read() as session:
        kept = read_sources(session, None).versions[run.result.published.alias]
        assert run.result.published.version.digest == kept.digest
        assert said == set(load_prompts(session, kept))


def test_manifest_describes_the_adapter_when_its_files_are_read(run: Run) -> None:
    """Rank, alpha and targets are those of the files, and the files are those that the manifest hashes."""
    manifest = run.manifest
    config = read_adapter_config(run.folder)
    weights = read_adapter_weights(run.folder, config, read_module_shapes(run.place.base_folder))

    assert (4, 8.0) == (manifest.rank, manifest.alpha) == (config.r, config.lora_alpha)
    assert manifest.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert len(weights.modules) == 14
    assert {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE} == set(manifest.files)
    # PEFT writes a set, whose order differs from process to process: equal runs would get different digests.
    targets = json.loads((run.folder / ADAPTER_CONFIG_FILE).read_bytes())["target_modules"]
    assert sorted(targets) == targets
    assert {ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE} == {path.name for path in run.folder.iterdir()}


def test_published_files_name_no_path_of_this_machine_when_they_are_read(run: Run) -> None:
    """What travels with a version says nothing about the folders of the machine that trained it."""
    published = {path.name: path.read_bytes().decode() for path in run.folder.glob("*.json")}

    assert {ADAPTER_CONFIG_FILE, MANIFEST_FILE} == set(published)
    folders = [tempfile.gettempdir(), str(run.place.core.home), str(run.place.train_path.parent), str(Path.home())]
    assert [(name, folder) for name, text in published.items() for folder in folders if folder + "/" in text] == []
    assert json.loads(published[ADAPTER_CONFIG_FILE])["base_model_name_or_path"] == BASE


def test_published_version_is_the_trained_model_when_plain_peft_loads_it(run: Run, tmp_path: Path) -> None:
    """A fresh base with the published folder on it computes what the model in memory computed, and not the base's."""
    prompt = torch.tensor([load_tokenizer(run.place.base_folder).encode("<|im_start|>user\nQ3???<|im_end|>\n")])
    in_memory = _train_in_memory(run.place, tmp_path)
    fresh = load_base(run.place.core).model
    disable_packed_kernels(fresh)  # the same arithmetic on both sides
    with torch.no_grad():
        of_base = fresh(prompt).logits
        loaded = PeftModel.from_pretrained(fresh, run.folder).eval()(prompt).logits
        expected = in_memory(prompt).logits

    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    assert (loaded - of_base).abs().max() > 0.5


def _train_in_memory(place: Workplace, tmp_path: Path) -> Any:
    """The run's model, made again by hand."""
    base = load_base(place.core)
    model = add_adapter(base, place.settings)
    rows = render_dataset(base.tokenizer, read_dataset(place.train_path), max_length=64)
    train_sft(TrainingRun(model, base, rows, place.settings, SilentListener()))
    return model.eval()


def test_published_version_has_the_recorded_loss_when_plain_peft_loads_it(run: Run) -> None:
    """The loss in the manifest is that of the files beside it."""
    base = load_base(run.place.core)
    disable_packed_kernels(base.model)
    install_row_attention(base.model)  # rounds as in training
    loaded = PeftModel.from_pretrained(base.model, run.folder).get_base_model()
    rows = render_dataset(base.tokenizer, read_dataset(run.place.validation_path), max_length=64)

    loss = evaluate(loaded, rows, batch_size=4, pad_token_id=base.tokenizer.pad_token_id).loss

    assert pytest.approx(run.result.validation_loss_after, rel=1e-5) == loss


def test_run_training_publishes_the_same_digest_when_run_again_elsewhere(
    tmp_path: Path, tiny_folders: dict[str, Path], run: Run
) -> None:
    """Equal base, data and settings give an equal name in another home folder; another seed gives another."""
    place = _make_workplace(tmp_path, tiny_folders["llama"], run.place.core.quantisation)

    assert run.result.published.version.digest == place.run(seed=0).published.version.digest
    assert run.result.published.version.digest != place.run(seed=1).published.version.digest


# Several versions.


def test_run_training_publishes_version_two_when_the_alias_has_one(place: Workplace) -> None:
    """The alias moves to the new version, and the first stays what it was."""
    first = place.run(seed=0)
    before = {path.name: path.read_bytes() for path in place.published(first).iterdir()}

    second = place.run(seed=1)

    registry = place.registry()
    assert (second.published.number, second.is_live) == (2, True)
    assert second.published == registry.alias("legal").current
    assert [first.published, second.published] == registry.versions("legal")
    assert before == {path.name: path.read_bytes() for path in place.published(first).iterdir()}
    registry.database.close()


def test_run_training_leaves_the_alias_when_it_is_not_to_promote(place: Workplace) -> None:
    """A version can be published and tried by its number before the name moves to it."""
    first = place.run(seed=0)

    second = place.run(seed=1, promote="never")

    registry = place.registry()
    assert (second.published.number, second.is_live) == (2, False)
    assert first.published == registry.alias("legal").current
    assert second.published == registry.find("legal@v2")
    registry.database.close()


def test_run_training_records_no_validation_when_there_is_no_file(place: Workplace) -> None:
    """Without a validation file there are no losses, rather than losses of the training rows, and a warning."""
    result = run_training(
        "legal", place.train_path, None, core=place.core, settings=place.settings, listener=place.recorder
    )

    manifest = Run(place, result).manifest
    assert (result.validation_loss_before, result.validation_loss_after) == (None, None)
    assert manifest.metrics == {
        "validation_loss_before": None,
        "validation_loss_after": None,
        "validation_accuracy_after": None,
        "num_steps": 6,
        "best_step": None,
    }
    assert manifest.data is not None
    assert (manifest.data.validation_sha256, manifest.data.num_validation_rows) == (None, 0)
    warned = "no validation rows: the gate can't compare; validation_share 0.15 holds 15 % of the rows out"
    assert warned in place.recorder.warnings


def test_run_training_holds_rows_out_when_a_share_is_given(place: Workplace) -> None:
    """They are validated with and not trained on, and the manifest says where they come from; too few are warned of."""
    path = write_rows(place.train_path, easy_rows(40))
    train, held_out = hold_out(read_dataset(path), 0.1)
    settings = place.settings.model_copy(update={"validation_share": 0.1, "max_steps": 2})

    result = run_training("legal", path, None, core=place.core, settings=settings, listener=place.recorder)

    manifest = Run(place, result).manifest
    assert manifest.data == DataReference(
        train_sha256=hash_file(path),
        num_train_rows=len(train.rows),
        validation_sha256=hash_file(path),
        num_validation_rows=len(held_out.rows),
        validation_share=0.1,
    )
    assert "validation_share" not in manifest.settings
    assert (len(train.rows), 40) == (result.num_rows, len(train.rows) + len(held_out.rows))
    assert result.validation_loss_after is not None
    few = f"validation_share 0.1 holds out {len(held_out.rows)} of 40 rows; the gate compares with 8 or more"
    assert 0 < len(held_out.rows) < 8
    assert any(warning.startswith(few) for warning in place.recorder.warnings)
    assert not any(warning.startswith("no validation rows") for warning in place.recorder.warnings)


def test_run_training_holds_nothing_out_when_a_validation_file_is_given(place: Workplace) -> None:
    """The share may be the home's setting for all runs: a file of its own counts more, and the manifest says so."""
    settings = place.settings.model_copy(update={"validation_share": 0.5, "max_steps": 1})

    result = run_training("legal", place.train_path, place.validation_path, core=place.core, settings=settings)

    data = Run(place, result).manifest.data
    assert data is not None
    assert (data.num_train_rows, data.num_validation_rows, data.validation_share) == (10, 3, None)


# What stops a run before it starts.


def _nowhere(tmp_path: Path) -> CoreSettings:
    """A home folder and a base model that do not exist."""
    return CoreSettings.load(tmp_path / "home", base=str(tmp_path / "no" / "base"), device="cpu")


def _base_without_weights(tmp_path: Path, tiny_folder: Path) -> CoreSettings:
    """A base model that has a tokenizer and nothing to load."""
    folder = tmp_path / "weightless"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    return CoreSettings.load(tmp_path / "home", base=str(folder), device="cpu")


@pytest.mark.parametrize("bad_file", ["train.jsonl", "valid.jsonl"])
def test_run_training_names_the_bad_row_when_there_is_not_even_a_base(tmp_path: Path, bad_file: str) -> None:
    """Data is checked first: before a base model is looked for, and before anything appears in the home folder."""
    core = _nowhere(tmp_path)
    paths = {name: write_rows(tmp_path / name, easy_rows(10)) for name in ("train.jsonl", "valid.jsonl")}
    write_rows(paths[bad_file], [*easy_rows(2), make_messages("a question without an answer")])

    with pytest.raises(DataError, match=rf"^{paths[bad_file]}:3: field messages"):
        run_training(
            "legal", paths["train.jsonl"], paths["valid.jsonl"], core=core, settings=TrainSettings.load(core.home)
        )

    assert not core.home.exists()


def test_run_training_refuses_a_share_when_it_leaves_no_row(tmp_path: Path) -> None:
    """One row, which the share holds out: there would be nothing to train on."""
    core = _nowhere(tmp_path)
    rows = next([row] for row in easy_rows(50) if hold_out(make_dataset(tmp_path / "one.jsonl", [row]), 0.5)[1].rows)
    train = write_rows(tmp_path / "train.jsonl", rows)

    with pytest.raises(DataError, match=r"validation_share 0\.5 holds out 1 of 1 rows, none is left to train on"):
        run_training("legal", train, None, core=core, settings=TrainSettings.load(core.home, validation_share=0.5))


def test_run_training_refuses_patience_when_there_is_no_validation_file(tmp_path: Path) -> None:
    """It would never run out; said before anything is loaded."""
    core = _nowhere(tmp_path)
    train = write_rows(tmp_path / "train.jsonl", easy_rows(10))

    with pytest.raises(ConfigurationError, match=r"^setting train\.patience: 2 validations .* no validation file"):
        run_training("legal", train, None, core=core, settings=TrainSettings.load(core.home, patience=2))

    assert not core.home.exists()


def test_run_training_refuses_the_alias_when_it_is_reserved(tmp_path: Path) -> None:
    """The name is checked before the data is read."""
    core = _nowhere(tmp_path)

    with pytest.raises(InvalidNameError, match="'base' is reserved"):
        run_training("base", tmp_path / "none.jsonl", None, core=core, settings=TrainSettings.load(core.home))

    assert not core.home.exists()


def test_run_training_names_the_base_when_it_is_not_there(tmp_path: Path) -> None:
    """With good data the missing base model is the error, and still nothing appears in the home folder."""
    core = _nowhere(tmp_path)
    train_path = write_rows(tmp_path / "train.jsonl", easy_rows(10))

    with pytest.raises(BaseModelError, match=core.base):
        run_training("legal", train_path, None, core=core, settings=TrainSettings.load(core.home))

    assert not core.home.exists()


@pytest.mark.parametrize("long_file", ["train.jsonl", "valid.jsonl"])
def test_run_training_names_the_long_row_when_the_base_can_not_be_loaded(
    tmp_path: Path, tiny_folders: dict[str, Path], long_file: str
) -> None:
    """Tokens are counted with the tokenizer alone, before any weight is read."""
    core = _base_without_weights(tmp_path, tiny_folders["llama"])
    paths = {name: write_rows(tmp_path / name, easy_rows(10)) for name in ("train.jsonl", "valid.jsonl")}
    write_rows(paths[long_file], [*easy_rows(1), make_messages("q", "a" * 100), *easy_rows(8)])
    settings = TrainSettings.load(core.home, max_length=64)

    with pytest.raises(DataError, match=rf"^{paths[long_file]}:2: \d+ tokens, more than max_length 64$"):
        run_training("legal", paths["train.jsonl"], paths["valid.jsonl"], core=core, settings=settings)

    assert not core.home.exists()


def test_run_training_learns_when_rows_are_less_than_a_batch(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Three rows for a batch of eight are one step with a learning rate above zero, and a version with an effect."""
    core = tiny_settings(tiny_folders["llama"], home=tmp_path / "home")
    train_path = write_rows(tmp_path / "train.jsonl", easy_rows(3))
    settings = TrainSettings.load(core.home, batch_size=8, epochs=1, max_length=256)

    result = run_training("legal", train_path, None, core=core, settings=settings)

    assert (1, "legal@v1") == (result.num_steps, result.published.label)


def test_run_training_publishes_nothing_when_the_training_had_no_effect(place: Workplace) -> None:
    """An adapter that changes nothing is refused by the server's own check, and the registry stays empty."""
    place.settings = place.settings.model_copy(update={"max_steps": 1, "learning_rate": 1e-46})

    with pytest.raises(AdapterWeightsError, match="no effect"):
        place.run()

    assert not (place.core.home / "store").exists()


def test_run_training_leaves_no_temporary_file_when_it_is_done(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the trainer's folder nor the unpublished adapter stays behind, after success and after failure."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    without_effect = {"max_steps": 1, "learning_rate": 1e-46}

    place.run()
    place.settings = place.settings.model_copy(update=without_effect)
    with pytest.raises(AdapterWeightsError):
        place.run()

    assert list(scratch.glob("hotswap-*")) == []


def test_run_says_what_takes_less_when_memory_runs_out(place: Workplace) -> None:
    """Torch's own words on a CPU, met in the middle of a run; nothing is published, and no scratch is left."""

    def exhaust(step: int, num_steps: int, loss: float) -> None:
        torch.empty(2**60)

    place.recorder.on_step = exhaust  # type: ignore[method-assign]
    with pytest.raises(OutOfMemoryError, match=r"lower batch_size or max_length, or set gradient_checkpointing$"):
        place.run()
    (folder,) = (place.core.home / "runs").iterdir()
    assert not any(folder.iterdir())


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_version_is_better_than_its_base_when_the_family_changes_its_logits(
    tmp_path: Path, tiny_folders: dict[str, Path], family: str
) -> None:
    """Scores that are capped and logits that are capped or scaled are those of training, too, from file to version."""
    result = _make_workplace(tmp_path, tiny_folders[family]).run()
    assert result.validation_loss_before is not None
    assert result.validation_loss_after is not None
    assert result.validation_loss_after < result.validation_loss_before - 0.5
