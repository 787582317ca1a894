"""/v1/fine_tuning/jobs with the unmodified OpenAI client and with raw bodies, in one process, without a supervisor."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pytest
from fastapi import Request

from adapters.errors import ConflictError, NotFoundError, OverloadedError
from adapters.gate_report import GateCheck, GateReport
from adapters.jobs import Claim, JobService
from adapters.methods import METHOD_SETTINGS, WIRE_METHODS
from adapters.records import JobError
from server.event_streams import EventStreams
from server.fine_tuning_schemas import Method, RewardedHyperparameters, SupervisedHyperparameters
from server.services import Services
from tests.support.conversations import easy_rows, write_rows
from tests.support.engine import Site, on_site
from tests.support.jobs import pass_all
from tests.support.sdk import with_sdk
from tests.support.tiny import make_manifest
from training.config import TrainSettings
from training.job_settings import resolve_settings

_JOBS = "/v1/fine_tuning/jobs"
_ELSEWHERE_ON_THE_WIRE = {"home", "seed", "method", "start_from", "report_to"}
# The operator's: what a version is measured against, files of the server, and what runs on its device.
_NOT_ON_THE_WIRE = {
    "sample_prompts",
    "sample_file",
    "sample_tokens",
    "use_liger_kernel",
    "gate_margin",
    "gate_confidence",
    "gate_samples",
    "gate_sample_tokens",
    "gate_degenerate",
}


@pytest.fixture
def file_id(site: Site, tmp_path: Path) -> str:
    """A training file that is uploaded."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(3)).read_bytes()
    return _services(site).files.upload(io.BytesIO(rows), "rows.jsonl").id


def _services(site: Site) -> Services:
    services: Services = site.app.state.services
    return services


def _jobs(site: Site) -> JobService:
    return _services(site).fine_tuning.jobs


def _create(site: Site, file_id: str, *, key: str | None = None, **fields: Any) -> httpx.Response:
    """Create a job; the files of one that is taken are found valid."""
    body = {"model": "tiny", "training_file": file_id} | fields
    headers = {} if key is None else {"idempotency-key": key}
    response = on_site(site, lambda http: http.post(_JOBS, json=body, headers=headers))
    pass_all(_jobs(site))
    return response


def _get(site: Site, path: str) -> httpx.Response:
    return on_site(site, lambda http: http.get(path))


def _claim(site: Site) -> Claim:
    claim = _jobs(site).claim(lease_s=60)
    assert claim is not None
    return claim


def test_openai_client_creates_and_reads_a_job_when_driven(site: Site, file_id: str) -> None:
    """Every field that the SDK sends comes back as the wire has it; knobs of our own go through `extra_body`."""

    async def scenario(client: openai.AsyncOpenAI) -> None:
        job = await client.fine_tuning.jobs.create(
            model="base",
            training_file=file_id,
            validation_file=file_id,
            suffix="legal",
            seed=5,
            metadata={"team": "a"},
            extra_body={
                "method": {
                    "type": "supervised",
                    "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "rank": 8}},
                }
            },
        )
        assert (job.object, job.status, job.model, job.seed) == (
            "fine_tuning.job",
            "validating_files",
            "tiny",
            5,
        )
        assert (job.training_file, job.validation_file, job.metadata) == (file_id, file_id, {"team": "a"})
        assert (job.fine_tuned_model, job.finished_at, job.error, job.result_files) == (None, None, None, [])
        assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
        assert job.method is not None
        assert job.method.supervised is not None
        assert job.method.supervised.hyperparameters is not None
        assert job.method.supervised.hyperparameters.to_dict()["rank"] == 8
        assert await client.fine_tuning.jobs.retrieve(job.id) == job
        assert [found.id async for found in client.fine_tuning.jobs.list()] == [job.id]
        paused = await client.fine_tuning.jobs.pause(job.id)
        resumed = await client.fine_tuning.jobs.resume(job.id)
        cancelled = await client.fine_tuning.jobs.cancel(job.id)
        assert [paused.status, resumed.status, cancelled.status] == ["paused", "validating_files", "cancelled"]
        assert cancelled.finished_at is not None
        with pytest.raises(openai.ConflictError, match="is cancelled"):
            await client.fine_tuning.jobs.resume(job.id)
        with pytest.raises(openai.NotFoundError):
            await client.fine_tuning.jobs.retrieve("ftjob-x")

    with_sdk(site, scenario)


def test_openai_client_pages_through_jobs_events_and_checkpoints_when_driven(site: Site, file_id: str) -> None:
    """The SDK's own pagers find everything once, newest first, and the metadata filter holds."""
    for number in range(5):
        assert _create(site, file_id, metadata={"kind": "odd" if number % 2 else "even"}).status_code == 200
    claim = _claim(site)
    for step in range(1, 8):
        data = {"step": step, "train_loss": 1 / step}
        _jobs(site).note_metrics(claim, f"Step {step}", data, trained_tokens=step, seconds_left=1)
    for step in (3, 6):
        _jobs(site).add_checkpoint(claim, step, {"train_loss": 0.5, "valid_loss": 0.25})

    async def scenario(client: openai.AsyncOpenAI) -> None:
        api = client.fine_tuning.jobs
        everything = [job.id async for job in api.list(limit=2)]
        assert (len(everything), len(set(everything)), everything[-1]) == (5, 5, claim.job.id)
        odd = [job.metadata async for job in api.list(limit=1, metadata={"kind": "odd"})]
        assert odd == [{"kind": "odd"}] * 2
        events = [event async for event in api.list_events(claim.job.id, limit=3)]
        assert len(events) == 13  # created, validating, valid, running, seven steps, two checkpoints
        steps = [event for event in events if event.type == "metrics"]
        assert [event.message for event in steps] == [f"Step {step}" for step in range(7, 0, -1)]
        assert steps[0].data == {"step": 7, "train_loss": 1 / 7}
        checkpoints = [found async for found in api.checkpoints.list(claim.job.id, limit=1)]
        assert [found.step_number for found in checkpoints] == [6, 3]
        assert checkpoints[0].metrics.valid_loss == 0.25
        assert checkpoints[0].fine_tuning_job_id == claim.job.id

    with_sdk(site, scenario)


def _upload(site: Site, *rows: dict[str, Any]) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return _services(site).files.upload(io.BytesIO(content), "rows.jsonl").id


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("dpo", {"prompt": "Q?", "chosen": "Yes", "rejected": "No"}),
        ("reward", {"prompt": "Q?", "chosen": "Yes", "rejected": "No"}),
        ("kto", {"prompt": "Q?", "completion": "Yes", "label": True}),
        ("supervised", {"text": "A whole text."}),
    ],
)
def test_job_is_made_for_each_method_when_its_rows_are_given(site: Site, kind: str, row: dict[str, Any]) -> None:
    """The kind of rows is known from the upload; knobs of the method come back as they were given."""
    file_id = _upload(site, row)
    chosen = {"rank": 4, "learning_rate": 0.001} | ({"beta": 0.2} if kind in ("dpo", "kto") else {})
    job = _create(site, file_id, method={"type": kind, kind: {"hyperparameters": chosen}}).json()
    assert job["method"]["type"] == kind
    assert chosen.items() <= job["method"][kind]["hyperparameters"].items()
    bare = _create(site, file_id, method={"type": kind}).json()
    assert bare["method"][kind]["hyperparameters"]["n_epochs"] == "auto"
    other = "supervised" if kind != "supervised" else "dpo"
    refused = _create(site, file_id, method={"type": other}).json()["error"]
    assert (refused["param"], "rows" in refused["message"]) == ("training_file", True)


def test_openai_client_creates_a_dpo_job_when_driven(site: Site) -> None:
    """Hosted preference rows and the SDK's own types, as they stand."""
    preference = {
        "input": {"messages": [{"role": "user", "content": "Q?"}]},
        "preferred_output": [{"role": "assistant", "content": "Yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "No"}],
    }
    file_id = _upload(site, preference)

    async def scenario(client: openai.AsyncOpenAI) -> None:
        job = await client.fine_tuning.jobs.create(
            model="base",
            training_file=file_id,
            method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}},
        )
        assert job.method is not None
        assert job.method.dpo is not None
        assert job.method.dpo.hyperparameters is not None
        assert (job.method.type, job.method.dpo.hyperparameters.beta) == ("dpo", 0.1)

    with_sdk(site, scenario)


def test_training_goes_on_from_the_version_of_the_moment_when_model_is_an_alias(site: Site, file_id: str) -> None:
    """Bound to a digest: the alias may move; the version can't be deleted while the job needs it."""
    first = site.publish("legal", f"{1:064x}")
    job = _create(site, file_id, model="legal", suffix="legal").json()
    assert job["model"] == "legal@v1"
    site.publish("legal", f"{2:064x}")
    assert _jobs(site).get(job["id"]).start_from == f"legal@{first.version.digest}"
    for name in ("legal@v1", "legal"):
        with pytest.raises(ConflictError, match=f"job {job['id']}, which is queued, goes on from legal@v1"):
            site.registry.remove(name)
    _jobs(site).cancel(job["id"])
    assert site.registry.remove("legal@v1") == ["legal@v1"]
    assert _create(site, file_id, model="legal@v1").status_code == 400


def test_job_is_found_again_when_its_request_is_repeated(site: Site, file_id: str) -> None:
    """By the header `Idempotency-Key`; another request under the same key is a 409, no client repeats that."""
    first, again = (_create(site, file_id, key="k-1", suffix="legal") for _ in range(2))
    assert (first.json()["id"], first.status_code, again.status_code) == (again.json()["id"], 200, 200)
    other = _create(site, file_id, key="k-1", suffix="medical")
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    assert _create(site, file_id, key="k-2", suffix="legal").json()["id"] != first.json()["id"]
    assert _create(site, file_id, key="k" * 256).json()["error"]["param"] == "idempotency-key"


def test_job_names_its_place_when_it_waits(site: Site, file_id: str) -> None:
    """The more urgent first; one that runs has no place."""
    ids = [_create(site, file_id, priority=priority).json()["id"] for priority in (0, 5, 0)]
    found = {job["id"]: (job["priority"], job["queue_position"]) for job in _get(site, _JOBS).json()["data"]}
    assert [found[job_id] for job_id in ids] == [(0, 2), (5, 1), (0, 3)]
    assert _claim(site).job.id == ids[1]
    assert [_get(site, f"{_JOBS}/{job_id}").json()["queue_position"] for job_id in ids] == [1, None, 2]


def test_integration_is_taken_when_its_library_is_installed(
    site: Site, file_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the answer says what to install."""
    wandb = {"type": "wandb", "wandb": {"project": "tickets", "tags": ["a"]}}
    refused = _create(site, file_id, integrations=[wandb]).json()["error"]
    assert "pip install wandb" in refused["message"]
    (tmp_path / "wandb.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert _create(site, file_id, integrations=[wandb]).json()["integrations"] == [wandb]


def test_checkpoint_is_called_by_its_name_when_it_is_kept(site: Site, file_id: str) -> None:
    """While its job runs, by keys that may use the alias alone; the answer says which checkpoint it was."""
    job_id = _create(site, file_id, suffix="legal").json()["id"]
    claim = _claim(site)
    digest, _ = site.registry.store.add(site.adapters[f"{1:064x}"], make_manifest(site.base.reference))
    _jobs(site).add_checkpoint(claim, 3, {"train_loss": 0.5}, digest=digest)
    (listed,) = _get(site, f"{_JOBS}/{job_id}/checkpoints").json()["data"]
    name = listed["fine_tuned_model_checkpoint"]
    assert (name, listed["is_kept"]) == (f"legal:{job_id[6:18]}:ckpt-step-3", True)
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = on_site(site, lambda http: http.post("/v1/chat/completions", json=body))
    assert (answer.status_code, answer.json()["model"]) == (200, name)
    assert (answer.headers["x-hotswap-version"], answer.headers["x-hotswap-route"]) == (name, "checkpoint")
    assert answer.headers["x-hotswap-digest"] == digest
    assert [row.route for row in site.exposures()] == ["checkpoint"]
    _, secret = site.keys.create("web", scopes=["chat"], aliases=["medical"])
    headers = {"authorization": f"Bearer {secret}"}
    refused = on_site(site, lambda http: http.post("/v1/chat/completions", json=body, headers=headers))
    assert refused.status_code == 404


def test_job_reports_what_came_of_it_when_it_has_ended(site: Site, file_id: str) -> None:
    """Success names model, result file and tokens; failure code, message and param."""
    first, second = _create(site, file_id).json(), _create(site, file_id).json()
    claim = _claim(site)
    with _jobs(site).database.write() as session:
        _jobs(site).succeed(session, claim, fine_tuned_model="legal@v1", result_file="file-r", trained_tokens=12)
    _jobs(site).fail(_claim(site), JobError("invalid_training_file", "line 2: bad", "training_file"))
    done, failed = (_get(site, f"{_JOBS}/{job['id']}").json() for job in (first, second))
    assert (done["status"], done["fine_tuned_model"], done["result_files"]) == ("succeeded", "legal@v1", ["file-r"])
    assert (done["trained_tokens"], done["error"]) == (12, None)
    assert failed["status"] == "failed"
    assert failed["error"] == {"code": "invalid_training_file", "message": "line 2: bad", "param": "training_file"}
    assert failed["finished_at"] >= failed["created_at"]


def test_job_tells_what_the_gate_found_when_it_has_made_a_version(site: Site, file_id: str) -> None:
    """Alone and in the list; null before."""
    job = _create(site, file_id).json()
    assert job["gate"] is None
    check = GateCheck(name="base", outcome="failed", sentence="validation loss 2 against 1", figures={"low": -1.5})
    manifest = make_manifest(site.base.reference).model_copy(update={"gate": GateReport(checks=[check])})
    version, _ = site.registry.publish(site.adapters[f"{1:064x}"], manifest, alias="legal", promote=False)
    claim = _claim(site)
    with _jobs(site).database.write() as session:
        _jobs(site).succeed(session, claim, fine_tuned_model=version.label, result_file="file-r", trained_tokens=1)

    found = _get(site, f"{_JOBS}/{job['id']}").json()["gate"]

    assert ("failed", "the gate was not passed: validation loss 2 against 1") == (found["verdict"], found["reason"])
    assert [{**check.model_dump()}] == found["checks"]
    assert [found] == [listed["gate"] for listed in _get(site, _JOBS).json()["data"]]


def test_too_many_paused_jobs_are_a_429_when_another_is_paused(site: Site, file_id: str) -> None:
    """Each keeps its checkpoints on the disk: as many may be paused as may wait."""
    bounded = JobService(_jobs(site).database, max_queued=2)
    ids = [_create(site, file_id).json()["id"] for _ in range(2)]
    for job_id in ids:
        bounded.pause(job_id)
    third = _create(site, file_id).json()["id"]
    with pytest.raises(
        OverloadedError, match=r"^2 jobs are paused, as many as this server keeps; cancel or resume one$"
    ):
        bounded.pause(third)
    assert "paused" == bounded.pause(ids[0]).status
    bounded.cancel(ids[0])
    assert "paused" == bounded.pause(third).status


def _supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "gpt-4o-mini"}, "model"),
        ({"model": "legal@v1"}, "model"),
        ({"training_file": "file-x"}, "training_file"),
        ({"validation_file": "file-x"}, "validation_file"),
        ({"suffix": "Not An Alias"}, "suffix"),
        ({"suffix": "base"}, "suffix"),
        ({"suffix": "x" * 64}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations"),
        ({"integrations": [{"type": "mlflow"}]}, "integrations.0.type"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "p", "tags": ["a,b"]}}]},
            "integrations.0.wandb.tags.0",
        ),
        ({"priority": 101}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"model": "legal:0123456789ab:ckpt-step-3"}, "model"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "training_file"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.1}}}}, "method.dpo.hyperparameters.beta"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"reference": "start"}}}},
            "method.dpo.hyperparameters.reference",
        ),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "grpo"}}, "method.grpo"),
        (
            {"method": {"type": "grpo", "grpo": {"hyperparameters": {"reward": "rewards.py:f"}}}},
            "method.grpo.hyperparameters.reward",
        ),
        ({"method": {"type": "grpo", "grpo": {"hyperparameters": {"reward": "tone@v1"}}}}, "method"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": _supervised(n_epochs=0)}, "method.supervised.hyperparameters.n_epochs"),
        ({"method": _supervised(n_epochs="many")}, "method.supervised.hyperparameters.n_epochs"),
        ({"method": _supervised(n_epochs=True)}, "method.supervised.hyperparameters.n_epochs"),
        ({"method": _supervised(batch_size=1025)}, "method.supervised.hyperparameters.batch_size"),
        ({"method": _supervised(rank=17)}, "method.supervised.hyperparameters.rank"),
        ({"method": _supervised(optimizer="sgd")}, "method.supervised.hyperparameters.optimizer"),
        (
            {"method": _supervised(learning_rate=0.1, learning_rate_multiplier=2)},
            "method.supervised.hyperparameters.learning_rate",
        ),
        ({"method": _supervised(beta=0.1)}, "method.supervised.hyperparameters.beta"),
        (
            {"method": {"type": "dpo", "dpo": {"hyperparameters": {"dropout": 0.1}}}},
            "method.dpo.hyperparameters.dropout",
        ),
        ({"method": _supervised(), "hyperparameters": {"n_epochs": 1}}, "hyperparameters"),
        ({"hyperparameters": {"n_epochs": 1001}}, "hyperparameters.n_epochs"),
        ({"organization": "x"}, "organization"),
    ],
)
def test_create_names_the_field_when_it_is_wrong_or_not_supported(
    site: Site, file_id: str, fields: dict[str, Any], param: str
) -> None:
    """A 400 in the envelope that names the field, and no job."""
    response = _create(site, file_id, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert _jobs(site).list(limit=1) == ([], False)


def test_learning_rate_multiplier_is_refused_when_it_is_no_number(site: Site, file_id: str) -> None:
    """JSON as Python writes it has NaN and Infinity; training has not."""
    for value in ("NaN", "Infinity", "-1", "0"):
        body = f'{{"model": "tiny", "training_file": "{file_id}", "hyperparameters": {{"learning_rate_multiplier": '
        content = f"{body}{value}}}}}".encode()
        response = on_site(
            site,
            lambda http, content=content: http.post(  # type: ignore[misc]
                _JOBS, content=content, headers={"content-type": "application/json"}
            ),
        )
        assert (value, response.status_code) == (value, 400)


def test_older_hyperparameters_are_taken_when_no_method_is_given(site: Site, file_id: str) -> None:
    """The wire's older place, and nothing at all, mean supervised training."""
    older = _create(site, file_id, hyperparameters={"n_epochs": 4, "learning_rate_multiplier": 0.5}).json()
    assert older["hyperparameters"] == {"n_epochs": 4, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    bare = _create(site, file_id).json()
    assert bare["method"]["type"] == "supervised"
    assert bare["hyperparameters"] == {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert 0 <= bare["seed"] < 2**31


def test_hyperparameters_have_the_bounds_of_the_trainer_when_compared() -> None:
    """What a request may ask for, training takes; server and trainer know nothing of each other."""
    fields = RewardedHyperparameters.model_fields | SupervisedHyperparameters.model_fields
    # A whole number on the wire: its least value is 1, where the trainer's is any above 0. Beta is as the wire has it,
    # a reward on the wire is a version alone.
    differing = {"n_epochs": "epochs", "beta": "beta", "reward": "reward", "targets": "targets"}
    no_settings = {"learning_rate_multiplier", "checkpoint_steps"}
    for name in set(fields) - set(differing) - no_settings:
        assert _bounds(fields[name]) == _bounds(TrainSettings.model_fields[name]), name
    compared = {differing.get(name, name) for name in fields} - no_settings
    assert compared | _ELSEWHERE_ON_THE_WIRE | _NOT_ON_THE_WIRE == set(TrainSettings.model_fields)
    assert compared.isdisjoint(_NOT_ON_THE_WIRE)


@pytest.mark.parametrize("kind", sorted(WIRE_METHODS))
def test_hyperparameters_are_those_of_the_method_when_compared_with_the_table(kind: str) -> None:
    """What a method does not use is an unknown field of its hyperparameters, and what it uses is known."""
    method = Method.model_fields[kind].annotation
    fields = set(get_args(method)[0].model_fields["hyperparameters"].annotation.model_fields)
    used = {name for name, methods in METHOD_SETTINGS.items() if WIRE_METHODS[kind] in methods}
    assert used - _NOT_ON_THE_WIRE == fields & set(METHOD_SETTINGS)


def _bounds(field: Any) -> dict[str, float]:
    """Lower and upper bound of a field, also inside a union."""
    metadata = list(field.metadata)
    for part in getattr(field.annotation, "__args__", ()):
        metadata += [piece for info in getattr(part, "__metadata__", ()) for piece in getattr(info, "metadata", [])]
    bounds = ("ge", "gt", "le", "lt")
    return {name: float(getattr(item, name)) for item in metadata for name in bounds if hasattr(item, name)}


def test_trainer_reads_what_the_wire_wrote_when_a_job_is_created(site: Site, file_id: str, tmp_path: Path) -> None:
    """From the request's body to the settings of the run, through the job table."""
    _create(site, file_id, seed=3, method=_supervised(n_epochs=2, rank=8, learning_rate=0.01, checkpoint_steps=5))
    settings = resolve_settings(_claim(site).job, tmp_path / "home")
    assert (settings.epochs, settings.rank, settings.learning_rate, settings.seed) == (2, 8, 0.01, 3)
    assert settings.batch_size == TrainSettings.load(tmp_path / "home").batch_size


@pytest.mark.parametrize("schema", [{"type": "object"}, '{"type": "object"}'])
def test_job_declares_its_format_when_it_is_created(site: Site, file_id: str, tmp_path: Path, schema: Any) -> None:
    """What a domain's answers look like belongs to its job, as an object or as text; so does what it may forget."""
    form = {"gate_format_regex": r"\{.*\}", "gate_format_schema": schema, "gate_format_share": 0.5}
    body = _create(site, file_id, method=_supervised(**form, gate_forgetting=0.2, validation_share=0.25)).json()
    assert body["method"]["supervised"]["hyperparameters"]["gate_format_schema"] == schema
    settings = resolve_settings(_claim(site).job, tmp_path / "home")
    assert (settings.gate_format_regex, settings.gate_format_share) == (r"\{.*\}", 0.5)
    assert settings.gate_format_schema == '{"type": "object"}'
    assert (settings.gate_forgetting, settings.validation_share) == (0.2, 0.25)


def test_job_is_refused_when_it_names_two_kinds_of_validation_rows_or_a_schema_that_is_too_long(
    site: Site, file_id: str
) -> None:
    """Both would be one too many; the length is that of the schema's text."""
    both = _create(site, file_id, method=_supervised(validation_share=0.2), validation_file=file_id)
    assert (both.status_code, both.json()["error"]["param"]) == (
        400,
        "method.supervised.hyperparameters.validation_share",
    )
    long = _create(site, file_id, method=_supervised(gate_format_schema={"title": "x" * 20_000}))
    assert long.status_code == 400
    assert "expected at most 20000 characters, found 20" in long.json()["error"]["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("after=ftjob-x", "after"),
        ("metadata[k]=" + "x" * 513, "metadata.k"),
        ("status=failed", "status"),
    ],
)
def test_list_names_the_parameter_when_it_is_wrong(site: Site, query: str, param: str) -> None:
    """Bounds hold, and unknown parameters are errors."""
    response = _get(site, f"{_JOBS}?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_too_many_waiting_jobs_are_a_429_when_created(site: Site, file_id: str) -> None:
    """The queue is bounded; clients are told when to try again."""
    bounded = JobService(_jobs(site).database, max_queued=1)
    _services(site).fine_tuning.jobs = bounded
    assert _create(site, file_id).status_code == 200
    response = _create(site, file_id)
    assert (response.status_code, response.headers["retry-after"]) == (429, "60")


def _sse(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_event_stream_follows_the_job_when_it_goes_on(
    site: Site, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events from the first on, those that come meanwhile, and an end when the job has ended."""
    job_id = _create(site, file_id).json()["id"]
    claim = _claim(site)

    async def scenario(http: httpx.AsyncClient) -> str:
        # The transport hands the body over at its end, so the job ends from within the stream's own polling.
        _jobs(site).note(claim, "working")
        _follow_then_cancel(monkeypatch)
        return (await http.get(f"{_JOBS}/{job_id}/events?stream=true")).text

    events = _sse(on_site(site, scenario))
    messages = [event["message"] for event in events[:-1]]
    assert messages == [
        f"Created fine-tuning job: {job_id}",
        "Validating the files",
        "The files are valid; the job is queued",
        "The job is running",
        "working",
        "The job was cancelled",
    ]
    assert {event["object"] for event in events[:-1]} == {"fine_tuning.job.event"}
    assert events[-1] == "[DONE]"


def _follow_then_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancel the job once the stream has looked at it and found nothing more to send."""
    follow = JobService.follow

    def cancelling(jobs: JobService, job_id: str, **options: Any) -> Any:
        found = follow(jobs, job_id, **options)
        if not found[0] and jobs.get(job_id).status == "running":
            jobs.cancel(job_id)
        return found

    monkeypatch.setattr(JobService, "follow", cancelling)


def test_event_stream_begins_behind_an_event_when_told(site: Site, file_id: str) -> None:
    """A client that was cut off goes on where it was; a paused job ends the stream."""
    job_id = _create(site, file_id).json()["id"]
    _jobs(site).pause(job_id)
    newest = _get(site, f"{_JOBS}/{job_id}/events?limit=2").json()["data"]
    text = _get(site, f"{_JOBS}/{job_id}/events?stream=true&after={newest[1]['id']}").text
    assert [event if event == "[DONE]" else event["message"] for event in _sse(text)] == [
        "The job was paused",
        "[DONE]",
    ]
    for path in (f"{_JOBS}/ftjob-x/events?stream=true", f"{_JOBS}/ftjob-x/checkpoints", f"{_JOBS}/ftjob-x/events"):
        assert _get(site, path).status_code == 404
    assert _get(site, f"{_JOBS}/{job_id}/events?stream=true&after=x").json()["error"]["param"] == "after"


@pytest.mark.parametrize(
    ("error", "code"), [(NotFoundError("the job is gone"), "not_found"), (RuntimeError("/secret"), "internal_error")]
)
def test_event_stream_ends_in_an_error_when_it_breaks_off(
    site: Site, file_id: str, error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A well-formed event in the envelope, which clients raise; never a quiet end or a path."""
    job_id = _create(site, file_id).json()["id"]
    follow = JobService.follow

    def failing(jobs: JobService, job_id: str, *, after: str | None, limit: int) -> Any:
        if after is not None:
            raise error
        return follow(jobs, job_id, after=after, limit=limit)

    monkeypatch.setattr(JobService, "follow", failing)
    events = _sse(_get(site, f"{_JOBS}/{job_id}/events?stream=true").text)
    assert events[0]["object"] == "fine_tuning.job.event"
    assert events[-1]["error"]["code"] == code
    assert "/secret" not in str(events)


def test_jobs_for_other_aliases_are_absent_when_the_key_is_limited(site: Site, file_id: str) -> None:
    """Not listed, not found, not to be cancelled; and no job may be made for an alias that is not the key's."""
    theirs = _create(site, file_id, suffix="support").json()["id"]
    _, secret = site.keys.create("web", scopes=["train"], aliases=["legal"])
    headers = {"authorization": f"Bearer {secret}"}

    def call(method: str, path: str, **options: Any) -> httpx.Response:
        return on_site(site, lambda http: http.request(method, f"{_JOBS}{path}", headers=headers, **options))

    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/checkpoints"), ("POST", "/cancel")):
        assert 404 == call(method, f"/{theirs}{path}").status_code, path
    content = {"file": ("rows.jsonl", json.dumps({"text": "Once."}).encode())}
    uploaded = on_site(
        site, lambda http: http.post("/v1/files", headers=headers, data={"purpose": "fine-tune"}, files=content)
    )
    body = {"model": "tiny", "training_file": uploaded.json()["id"]}
    unseen = call("POST", "", json=body | {"suffix": "legal", "training_file": file_id})
    assert "training_file" == unseen.json()["error"]["param"]
    for suffix in ({"suffix": "support"}, {}):
        refused = call("POST", "", json=body | suffix)
        assert (403, "alias_not_allowed", "suffix") == (
            refused.status_code,
            refused.json()["error"]["code"],
            refused.json()["error"]["param"],
        )
    own = call("POST", "", json=body | {"suffix": "legal"}).json()["id"]
    assert [own] == [job["id"] for job in call("GET", "").json()["data"]]
    assert "queued" == _jobs(site).get(theirs).status
    assert [] == call("GET", f"/{own}/checkpoints").json()["data"]


def test_event_stream_ends_in_an_error_when_the_server_is_about_to_end(site: Site, file_id: str) -> None:
    """A job may take hours, which the end of a server does not wait for."""
    job_id = _create(site, file_id).json()["id"]

    async def scenario(http: httpx.AsyncClient) -> str:
        await site.client.drain(limit_s=0)
        return (await http.get(f"{_JOBS}/{job_id}/events?stream=true")).text

    (error,) = _sse(on_site(site, scenario))
    assert "engine_unavailable" == error["error"]["code"]


def test_event_stream_is_refused_when_too_many_are_open(site: Site, file_id: str) -> None:
    """Each asks the database again and again; one that has ended, or was never read, holds no place."""
    job_id = _create(site, file_id).json()["id"]
    _jobs(site).pause(job_id)
    _services(site).fine_tuning.streams = streams = EventStreams(max_open=1)
    path = f"{_JOBS}/{job_id}/events?stream=true"
    assert [_get(site, path).status_code for _ in range(3)] == [200] * 3
    unread = streams.open(_services(site), job_id, None, Request({"type": "http"}))
    refused = _get(site, path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    del unread
    assert _get(site, path).status_code == 200
