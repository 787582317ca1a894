"""From upload to chat on real servers: a script for the hosted API, the sync SDK, and a server that ends in a job."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from clients.local_server import running_server
from tests.e2e.conftest import Home, make_home
from tests.support.conversations import easy_rows, write_rows

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Home:
    """A home over a tiny random Llama, with a small cap on uploads."""
    root = tmp_path_factory.mktemp("jobs")
    return make_home(
        root / "home",
        tiny_folders["llama"],
        HOTSWAP_QUANTISATION="none",
        HOTSWAP_SERVE_MAX_FILE_BYTES="200000",
        HOTSWAP_SERVE_JOBS="true",
    )


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    """The URL of a server that trains jobs."""
    with running_server(home.environment, home.path / "server.log") as found:
        yield found


def _client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def _start_job(client: openai.OpenAI, folder: Path, *, num_epochs: int, checkpoint_steps: int | None = None) -> str:
    rows = write_rows(folder / "rows.jsonl", easy_rows(10))
    with rows.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    hyperparameters = {"n_epochs": num_epochs, "batch_size": 4, "rank": 4, "max_length": 64}
    if checkpoint_steps is not None:
        hyperparameters["checkpoint_steps"] = checkpoint_steps
    job = client.fine_tuning.jobs.create(
        model="base",
        training_file=uploaded.id,
        suffix="quick",
        extra_body={"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}},
    )
    return job.id


def _wait_until_ended(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status in ("validating_files", "queued", "running"):
        time.sleep(0.02)
    return job


def test_script_for_the_hosted_api_runs_unchanged_when_told_where_the_server_is(
    tmp_path: Path, embedded_base: Path
) -> None:
    """The example, as it stands, trains the embedded 4-bit base for three steps and chats with the result."""
    home = make_home(tmp_path / "home", embedded_base, HOTSWAP_SERVE_JOBS="true")
    data = {}
    for part, num_rows in (("train", 12), ("valid", 2)):
        lines = (_ROOT / f"examples/support.{part}.jsonl").read_text().splitlines()[:num_rows]
        data[part] = tmp_path / f"{part}.jsonl"
        data[part].write_text("\n".join(lines))
    with running_server(home.environment, home.path / "server.log") as url:
        result = subprocess.run(
            [sys.executable, "examples/hosted_api_script.py", str(data["train"]), str(data["valid"]), "base", "1"],
            cwd=_ROOT,
            env=home.environment | {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "unused"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("created ftjob-")
    assert any(line.startswith("  Step 3/3: training loss=") for line in lines)
    assert "  The job has successfully completed" in lines
    (row,) = [line for line in lines if line.startswith("3,")]
    assert all(float(cell) >= 0 for cell in row.split(","))
    (answer,) = [line for line in lines if line.startswith("support@v1: ")]
    assert len(answer) > len("support@v1: ")


def test_fine_tuned_model_answers_at_once_when_the_job_says_succeeded(url: str, tmp_path: Path) -> None:
    """Polled as fast as may be: the first answer under the new name is the new version's, and the alias has moved."""
    client = _client(url)
    job = _wait_until_ended(client, _start_job(client, tmp_path, num_epochs=2))
    assert (job.status, job.fine_tuned_model) == ("succeeded", "quick@v1")
    for name in ("quick@v1", "quick"):
        raw = client.chat.completions.with_raw_response.create(
            model=name, messages=[{"role": "user", "content": "Q1?"}], max_tokens=4
        )
        assert raw.headers["x-hotswap-version"] == "quick@v1"
    assert job.result_files
    csv = client.files.content(job.result_files[0]).text
    assert csv.splitlines()[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(csv.splitlines()) == 7
    with httpx.stream("GET", f"{url}/v1/fine_tuning/jobs/{job.id}/events", params={"stream": "true"}) as stream:
        events = [line for line in stream.iter_lines() if line]
    assert "The job has successfully completed" in events[-2]
    assert events[-1] == "data: [DONE]"


def test_upload_is_cut_when_it_is_larger_than_the_cap(url: str, home: Home) -> None:
    """Over a real socket: the server answers before it has read what is sent, and keeps nothing."""
    client = _client(url)
    before = sorted(path.name for path in (home.path / "files").iterdir())
    with pytest.raises((openai.APIStatusError, openai.APIConnectionError)) as caught:
        client.files.create(file=("big.jsonl", b"x" * 50_000_000), purpose="fine-tune")
    # Either the answer was read, or the connection was closed while the rest was being sent.
    assert getattr(caught.value, "status_code", 413) == 413
    assert sorted(path.name for path in (home.path / "files").iterdir()) == before
    assert [path for path in (home.path / "files" / ".incoming").iterdir() if path.name != ".lock"] == []
    assert "big.jsonl" not in [file.filename for file in client.files.list()]


def test_job_waits_with_its_checkpoint_when_the_server_ends(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """SIGTERM of the server in the middle of a run; the next server finishes the job."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_QUANTISATION="none", HOTSWAP_SERVE_JOBS="true")
    with running_server(home.environment, home.path / "first.log") as url:
        client = _client(url)
        job_id = _start_job(client, tmp_path, num_epochs=150, checkpoint_steps=20)
        while not client.fine_tuning.jobs.checkpoints.list(job_id).data:
            time.sleep(0.05)
    assert home.run("jobs", "show", job_id)["status"] == "queued"
    with running_server(home.environment, home.path / "second.log") as url:
        client = _client(url)
        job = _wait_until_ended(client, job_id)
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    assert (job.status, job.fine_tuned_model) == ("succeeded", "quick@v1")
    steps = [message.split("/")[0] for message in messages if message.startswith("Step ")]
    assert len(steps) == len(set(steps)) == 450  # none was taken twice
