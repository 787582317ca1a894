"""One attempt at a job, in this process: what it publishes and reports, and how it is stopped."""

from __future__ import annotations

import errno
import io
import json
import resource
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from adapters.checkpoint_adapters import CheckpointAdapters
from adapters.errors import (
    BaseModelError,
    ConfigurationError,
    DataError,
    FingerprintMismatchError,
    HotswapError,
    InvalidInputError,
    NotFoundError,
    RankTooHighError,
    StorageFullError,
)
from adapters.jobs import JobOrder
from adapters.records import Actor, Job, JobError
from adapters.tables import utc_now
from tests.support.conversations import easy_rows, make_messages
from tests.support.jobs import HYPERPARAMETERS, JobPlace, pass_all, supervised
from tests.support.tiny import tiny_settings
from training.job import (
    JobRun,
    checkpoints_folder,
    discard_unrecorded,
    newest_checkpoint,
    write_csv,
)
from training.job_settings import describe_failure, name_data, resolve_settings, tracker_environment
from training.plots import CURVES_FILE
from training.progress import StepMetrics
from training.validation import ValidationRun


@pytest.fixture
def place(tmp_path: Path, tiny_folders: dict[str, Path]) -> JobPlace:
    """An empty home over a tiny Llama."""
    return JobPlace.make(tmp_path, tiny_folders["llama"])


@dataclass
class Interruption:
    """Something that happens when a run has reported a step, or has come to a stage; it is noticed a step later."""

    act: Callable[[], Any]
    at_step: int = 0
    at_stage: str = ""


class InterruptedRun(JobRun):
    """A run in which something happens."""

    interruption: Interruption

    def on_metrics(self, metrics: StepMetrics) -> None:
        """Act behind a step."""
        super().on_metrics(metrics)
        if metrics.step == self.interruption.at_step:
            self.interruption.act()

    def on_stage(self, message: str) -> None:
        """Act at the beginning of a stage."""
        super().on_stage(message)
        if message == self.interruption.at_stage:
            self.interruption.act()


def _run(place: JobPlace, interruption: Interruption | None = None, stopping: threading.Event | None = None) -> Job:
    """Claim the oldest job, run it and let it go."""
    claim = place.claim()
    process = place.process(claim, stopping)
    if interruption is None:
        JobRun(process, place.registry()).run()
    else:
        run = InterruptedRun(process, place.registry())
        run.interruption = interruption
        run.run()
    return place.jobs.release(claim)


def _is_published(place: JobPlace, alias: str = "legal") -> bool:
    try:
        place.registry().find(alias)
    except NotFoundError:
        return False
    return True


def test_run_publishes_and_reports_when_all_goes_well(place: JobPlace) -> None:
    """The version, the events of every step, the checkpoints of both epochs, and the result file."""
    job = place.create()
    done = _run(place)
    assert (done.status, done.fine_tuned_model, done.error) == ("succeeded", "legal@v1", None)
    assert place.registry().find("legal").label == "legal@v1"
    assert (done.trained_tokens or 0) > 100
    messages = place.messages(job.id)
    assert messages[-2:] == ["New fine-tuned model created: legal@v1", "The job has successfully completed"]
    assert sum(message.startswith("Step ") for message in messages) == 8
    (remark,) = (
        event.message for event in place.jobs.events(job.id, limit=100, level="warn")[0] if "last" in event.message
    )
    assert remark.startswith("the validation loss was still falling at the last step, to ")
    assert done.result_file is not None
    lines = place.files.path(done.result_file).read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    rows = [line.split(",") for line in lines[1:]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(row[3]) for row in rows] == [False, False, True, False, False, True]
    assert float(rows[5][1]) < float(rows[0][1])
    checkpoints, _ = place.jobs.checkpoints(job.id, limit=10)
    assert [checkpoint.step for checkpoint in checkpoints] == [6, 3]
    assert set(checkpoints[0].metrics) == {
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "valid_forgetting",
        "valid_mean_token_accuracy",
    }


def test_job_makes_the_same_version_when_it_was_paused_and_resumed(place: JobPlace) -> None:
    """Paused in the middle of an epoch: the run that goes on ends with the same bytes as one that was let alone."""
    place.create(alias="whole")
    _run(place)
    job = place.create(alias="parts")
    paused = _run(place, Interruption(lambda: place.jobs.pause(job.id), at_step=3))
    assert (paused.status, _is_published(place, "parts")) == ("paused", False)
    assert checkpoints_folder(place.core.home, job.id).joinpath("checkpoint-4").is_dir()
    # One looks at the curves of a run that was stopped most of all.
    assert "<polyline" in (place.core.home / "jobs" / job.id / CURVES_FILE).read_text()
    place.jobs.resume(job.id)
    done = _run(place)
    assert done.status == "succeeded"
    whole, parts = place.registry().find("whole"), place.registry().find("parts")
    assert whole.version.digest == parts.version.digest
    steps = [message.split("/")[0][5:] for message in place.messages(job.id) if message.startswith("Step ")]
    assert steps == ["1", "2", "3", "3", "4", "5", "6", "6"]  # twice where it was validated: the pause is no such step


def test_checkpoint_answers_by_its_name_when_the_job_goes_on_and_after(place: JobPlace) -> None:
    """Each of the newest three is a whole version in the store; older ones are gone, and so are all a week later."""
    place.create(checkpoint_steps=1)
    seen: list[str] = []

    def call() -> None:
        for checkpoint in place.jobs.checkpoints(place.jobs.list(limit=1)[0][0].id, limit=9)[0]:
            if checkpoint.is_kept:
                binding = place.registry().resolve(checkpoint.name, unit="u")
                assert (binding.route, binding.version_label) == ("checkpoint", checkpoint.name)
                assert binding.digest is not None
                manifest = place.registry().store.verify(binding.digest)
                seen.append(f"{checkpoint.step}:{manifest.metrics['checkpoint_step']}")

    done = _run(place, Interruption(call, at_step=5))
    assert (done.status, seen) == ("succeeded", ["4:4", "3:3", "2:2"])
    checkpoints, _ = place.jobs.checkpoints(done.id, limit=9)
    assert [(found.step, found.is_kept) for found in checkpoints] == [(n, n > 3) for n in range(6, 0, -1)]
    assert checkpoints[0].name == f"legal:{done.id[6:18]}:ckpt-step-6"
    for gone in (checkpoints[-1].name, checkpoints[0].name.replace("step-6", "step-7")):
        with pytest.raises(NotFoundError, match="there is no checkpoint of 'legal' at step"):
            place.registry().resolve(gone, unit="u")
    stranger = place.registry().acting_for(Actor("key-1", aliases=frozenset({"medical"})))
    with pytest.raises(NotFoundError):
        stranger.resolve(checkpoints[0].name, unit="u")
    store = place.registry().store
    assert len(store.digests()) == 4
    CheckpointAdapters(place.database, store).sweep()
    assert len(store.digests()) == 4
    CheckpointAdapters(place.database, store, clock=lambda: utc_now() + timedelta(days=8)).sweep()
    assert store.digests() == {place.registry().find("legal@v1").version.digest}


def test_job_goes_on_from_the_version_of_its_creation_when_it_prefers(place: JobPlace) -> None:
    """DPO over uploaded preference rows: the version is the parent and the reference, and an event says so."""
    place.create(validate=False)
    first = _run(place).fine_tuned_model
    assert first == "legal@v1"
    rows = [{"prompt": f"Q{n}?", "chosen": "Yes!", "rejected": "No."} for n in range(4)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file_id = place.files.upload(io.BytesIO(content), "pairs.jsonl").id
    method = {"type": "dpo", "dpo": {"hyperparameters": HYPERPARAMETERS | {"beta": 0.2, "n_epochs": 1}}}
    order = JobOrder("tiny", file_id, method, 7, alias="legal", row_kinds=("preference",), start_from="legal")
    place.jobs.create(order)
    pass_all(place.jobs)
    done = _run(place)
    assert (done.status, done.model, done.fine_tuned_model) == ("succeeded", "legal@v1", "legal@v2")
    registry = place.registry()
    manifest = registry.store.read_manifest(registry.find("legal@v2").version.digest)
    assert (manifest.method, manifest.parent) == ("dpo", registry.find("legal@v1").version.digest)
    assert [message for message in place.messages(done.id) if message.startswith("The reference is legal@")]


@pytest.mark.parametrize("point", [{"at_step": 2}, {"at_stage": "Publishing"}])
def test_job_fails_in_words_when_what_it_writes_finds_no_room(place: JobPlace, point: dict[str, Any]) -> None:
    """A checkpoint and a publication that the system cuts off: nothing of either is left."""
    place.core = place.core.model_copy(update={"max_rank": 256})
    place.create(rank=256, checkpoint_steps=3, validate=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_500_000, before[1]))  # the adapter has 2.1 MB
    try:
        failed = _run(place, Interruption(limit, **point))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.error == JobError("disk_full", "the server's disk is full: free some space and create the job again")
    assert not _is_published(place)
    assert not checkpoints_folder(place.core.home, failed.id).exists()
    assert place.files.list(limit=10, purpose="fine-tune-results") == ([], False)
    assert not [path for path in place.registry().store.root.joinpath(".incoming").iterdir() if path.is_dir()]


def test_nothing_is_published_when_the_job_is_cancelled(place: JobPlace) -> None:
    """At a step, and in the last moment before it would be published."""
    for interruption in (Interruption(print, at_step=2), Interruption(print, at_stage="Publishing")):
        interruption.act = partial(place.jobs.cancel, place.create().id)
        assert _run(place, interruption).status == "cancelled"
        assert not _is_published(place)
        assert place.files.list(limit=10, purpose="fine-tune-results") == ([], False)


def test_job_waits_again_when_the_supervisor_ends(place: JobPlace) -> None:
    """The run writes a checkpoint, and the next goes on from it."""
    job = place.create()
    stopping = threading.Event()
    assert _run(place, Interruption(stopping.set, at_step=3), stopping).status == "queued"
    assert [checkpoint.step for checkpoint in place.jobs.checkpoints(job.id, limit=9)[0]] == [4, 3]
    assert _run(place).status == "succeeded"


def test_job_fails_with_the_line_when_a_row_is_too_long(place: JobPlace) -> None:
    """Only the tokenizer tells how long a row is; the message has the field and the line, and no path."""
    long_rows = [make_messages("short", "yes"), make_messages("x" * 100, "yes")]
    file_id = place.upload(long_rows)
    good = place.upload(easy_rows(4))
    place.jobs.create(JobOrder("tiny", file_id, supervised(), 0, alias="legal"))
    place.jobs.create(JobOrder("tiny", good, supervised(), 0, alias="legal", validation_file=file_id))
    pass_all(place.jobs)
    failed = _run(place)
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_training_file", "training_file")
    assert failed.error.message.startswith("rows.jsonl:2: ")
    assert "more than max_length 64" in failed.error.message
    assert str(place.core.home) not in failed.error.message
    other = _run(place).error
    assert other is not None
    assert (other.code, other.param) == ("invalid_validation_file", "validation_file")


@pytest.mark.parametrize(
    ("name", "between", "place_of_row"),
    [("rows.tsv", b"\n", "rows.tsv:3"), ("rows.json", b"", "rows.json: row 2"), ("upload", b"\n", "upload: row 3")],
)
def test_job_names_the_place_in_its_owners_file_when_the_rows_were_made_of_one(
    place: JobPlace, name: str, between: bytes, place_of_row: str
) -> None:
    """By the line that it has there, with blank ones between the rows; where a file has none to name, the row.

    Of lines that a client uploaded under a name without an ending the number is that of the line, as at the upload.
    """
    rows = [make_messages("short", "yes"), make_messages("x" * 100, "yes")]
    lines = [(json.dumps({"messages": row}) + "\n").encode() for row in rows]
    file_id = place.files.upload(io.BytesIO(between.join(lines)), name).id
    place.jobs.create(JobOrder("tiny", file_id, supervised(), 0, alias="legal"))
    claim = place.jobs.claim_validation(lease_s=60)
    assert claim is not None
    ValidationRun(place.process(claim)).run()
    place.jobs.create(JobOrder("tiny", file_id, supervised(), 0, alias="legal"))
    pass_all(place.jobs)
    validated, trained = place.jobs.get(claim.job.id).error, _run(place).error
    assert validated is not None
    assert trained is not None
    assert [True, True] == [error.message.startswith(f"{place_of_row}: ") for error in (validated, trained)]


def test_name_data_gives_the_names_of_the_owner_when_files_have_some(place: JobPlace) -> None:
    """Two files of one name are told apart by their fields."""
    rows = json.dumps({"messages": make_messages("q", "a")}).encode()
    first, second, third = (place.files.upload(io.BytesIO(rows), name).id for name in ("a.jsonl", "b.jsonl", "a.jsonl"))
    other, same, alone = (
        place.jobs.create(JobOrder("tiny", first, supervised(), 0, alias="legal", validation_file=validation))
        for validation in (second, third, None)
    )

    assert {"training_file": "a.jsonl", "validation_file": "b.jsonl"} == name_data(other, place.files)
    both = {"training_file": "a.jsonl (training_file)", "validation_file": "a.jsonl (validation_file)"}
    assert both == name_data(same, place.files)
    assert {"training_file": "a.jsonl"} == name_data(alone, place.files)


def test_job_fails_when_its_file_is_gone(place: JobPlace) -> None:
    """Whatever happens to a job, it says so."""
    job = place.create(validate=False)
    (place.files.root / job.training_file).unlink()
    failed = _run(place)
    assert failed.error is not None
    assert failed.error.code == "invalid_training_file"
    assert str(place.core.home) not in failed.error.message


def test_failures_tell_no_path_when_they_are_described() -> None:
    """What a client can act on has a code of its own; of all else only the kind is told."""
    expected = {
        "invalid_training_file": DataError(["training_file:1: bad"], param="training_file"),
        "invalid_hyperparameters": RankTooHighError(rank=32, max_rank=16),
        "out_of_memory": torch.OutOfMemoryError("CUDA"),
        "disk_full": OSError(errno.ENOSPC, "No space left on device", "/secret/place"),
        "training_failed": BaseModelError("/secret/place holds no model"),
        "trainer_crashed": RuntimeError("/secret/place"),
    }
    described = {code: describe_failure(error) for code, error in expected.items()}
    assert {code: error.code for code, error in described.items()} == {code: code for code in expected}
    assert [error for error in described.values() if "/secret" in error.message] == []
    assert described["trainer_crashed"] == JobError(
        "trainer_crashed", "the trainer failed with RuntimeError; the job's log on the server says why"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConfigurationError("setting train.targets: the base model has no linear layer 'x'; it has q_proj"),
            "setting train.targets: the base model has no linear layer 'x'; it has q_proj",
        ),
        (
            ConfigurationError(
                "/secret/home/hotswap.toml: setting train.rank: expected and/or; found file:///secret/x"
            ),
            "[a path of the server]: setting train.rank: expected and/or; found file://[a path of the server]",
        ),
        (NotFoundError("there is no adapter 'tone'; known: base"), "there is no adapter 'tone'; known: base"),
        (
            FingerprintMismatchError(adapter="a1", base="b2"),
            "the adapter was made for the base model with fingerprint a1, but this base model has b2",
        ),
    ],
)
def test_failure_says_what_to_do_when_the_error_does(error: HotswapError, message: str) -> None:
    """The words of the error itself, without paths."""
    assert JobError("training_failed", message) == describe_failure(error)


def test_failure_is_told_in_words_when_a_library_runs_out_of_memory_or_disk() -> None:
    """Neither torch on a CPU nor safetensors has a class for it; the reason may stand behind another error."""
    with pytest.raises(RuntimeError) as memory:
        torch.empty(2**62, dtype=torch.uint8)
    assert describe_failure(memory.value).code == "out_of_memory"
    behind = RuntimeError("checkpoint failed")
    behind.__cause__ = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert describe_failure(behind).code == "disk_full"
    told = describe_failure(
        StorageFullError("the disk is full: 1.0 MB free, the base model takes 380 MB, not in /secret/home")
    )
    assert ("disk_full", False) == (told.code, "/secret" in told.message)
    assert describe_failure(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")).code == "disk_full"
    assert describe_failure(PermissionError(errno.EACCES, "denied")).code == "trainer_crashed"


def test_settings_are_refused_when_they_do_not_fit_together(place: JobPlace) -> None:
    """What no bound of a field can tell is the method's fault; what the server is set to is not the job's."""
    job = place.create(learning_rate_multiplier=2.0)
    odd = replace(job, method={"type": "dpo", "dpo": {"hyperparameters": {"reference": "start"}}})
    with pytest.raises(InvalidInputError, match="reference start needs start_from") as caught:
        resolve_settings(odd, place.core.home)
    told = describe_failure(caught.value)
    assert (told.code, told.param) == ("invalid_hyperparameters", "method")
    (place.core.home / "hotswap.toml").write_text("[train]\nrank = 0\n")
    with pytest.raises(ConfigurationError, match=r"train\.rank"):
        resolve_settings(job, place.core.home)


def test_patience_is_refused_when_the_job_has_no_validation_file(place: JobPlace) -> None:
    """The job's own: it could never run out. What the server is set to is for jobs that are validated."""
    assert resolve_settings(place.create(patience=2), place.core.home).patience == 2
    with pytest.raises(InvalidInputError, match="there is no validation file") as caught:
        resolve_settings(place.create(validate=False, patience=2), place.core.home)
    told = describe_failure(caught.value)
    assert (told.code, told.param) == ("invalid_hyperparameters", "method")
    (place.core.home / "hotswap.toml").write_text("[train]\npatience = 3\n")
    assert resolve_settings(place.create(), place.core.home).patience == 3
    assert resolve_settings(place.create(validate=False), place.core.home).patience is None
    (place.core.home / "hotswap.toml").write_text("[train]\npatience = 3\nvalidation_share = 0.1\n")
    assert resolve_settings(place.create(validate=False), place.core.home).patience == 3


def test_settings_name_method_start_and_trackers_when_the_job_does(place: JobPlace) -> None:
    """A job for another method, from a version, shown by a tracker."""
    start = f"legal@{'a' * 64}"
    wandb = {"type": "wandb", "wandb": {"project": "p", "tags": ["a", "b"]}}
    job = replace(place.create(), start_from=start, integrations=(wandb,))
    job = replace(job, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": "auto"}}})
    settings = resolve_settings(job, place.core.home)
    assert (settings.method, settings.beta, settings.start_from) == ("dpo", 0.3, start)
    assert (settings.reference, settings.report_to) == ("start", ("wandb",))
    assert tracker_environment(job) == {"WANDB_PROJECT": "p", "WANDB_TAGS": "a,b"}


def test_settings_come_from_the_job_when_it_gives_them(place: JobPlace) -> None:
    """An "auto" leaves the server's own; the multiplier scales the server's learning rate, up to 1."""
    (place.core.home / "hotswap.toml").write_text("[train]\nbatch_size = 3\nlearning_rate = 0.01\nepochs = 9\n")
    job = place.create(
        n_epochs="auto", batch_size="auto", learning_rate=None, learning_rate_multiplier=2.5, checkpoint_steps=5
    )
    settings = resolve_settings(job, place.core.home)
    assert (settings.epochs, settings.batch_size, settings.rank, settings.seed) == (9, 3, 4, 7)
    assert settings.learning_rate == pytest.approx(0.025)
    job = place.create(learning_rate=None, learning_rate_multiplier=1000.0)
    assert resolve_settings(job, place.core.home).learning_rate == 1.0


def test_newest_checkpoint_is_one_that_is_recorded_and_there_when_chosen(tmp_path: Path) -> None:
    """What is not recorded may be half written; what was rotated away is not there."""
    for step in (3, 6, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert newest_checkpoint(tmp_path, [3, 6, 12]) == tmp_path / "checkpoint-6"
    assert newest_checkpoint(tmp_path, []) is None
    discard_unrecorded(tmp_path, [6, 12])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_csv_leaves_cells_empty_when_nothing_was_measured() -> None:
    """Steps stay whole numbers, however large."""
    rows = [{"step": 1_000_000, "train_loss": 0.123456789, "train_mean_token_accuracy": 1.0}]
    assert write_csv(rows).splitlines()[1] == "1000000,0.123457,1,,"


def test_environment_gives_the_same_settings_when_another_process_resolves_them(
    tmp_path: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer loads the base model that the server serves, whatever flags the server was started with."""
    core = tiny_settings(tiny_folders["llama"], home=tmp_path / "home").model_copy(update={"max_rank": 4})
    assert core.environment["HOTSWAP_MAX_RANK"] == "4"
    for name, value in core.environment.items():
        monkeypatch.setenv(name, value)
    assert type(core).load(Path(core.environment["HOTSWAP_HOME"])) == core
