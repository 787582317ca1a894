"""The command line in process, on a home folder with a tiny base model and two versions of one adapter."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from adapters.archive import VersionArchive
from adapters.database import open_database
from adapters.errors import ConfigurationError, HotswapError, OverloadedError, StorageFullError
from adapters.files import FileService
from adapters.jobs import JobOrder, JobService
from adapters.store import ArtifactStore
from clients.cli.main import app, tell_people
from server.home_lock import held_home
from tests.support.conversations import easy_rows, write_rows
from tests.support.disk import small_disk
from tests.support.jobs import pass_all
from tests.support.tiny import save_random_adapter


class Shell:
    """Runs commands in this process on one home folder."""

    def __init__(self, home: Path, base: Path) -> None:
        self.environment = {
            "HOTSWAP_HOME": str(home),
            "HOTSWAP_BASE": str(base),
            "HOTSWAP_QUANTISATION": "none",
            "COLUMNS": "200",
        }

    def text(self, *arguments: str) -> str:
        """Run a command that succeeds and return what it printed."""
        result = CliRunner().invoke(app, list(arguments), env=self.environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run a command with --json and return its document."""
        return json.loads(self.text(*arguments, "--json"))


@pytest.fixture
def shell(tmp_path: Path, tiny_folders: dict[str, Path]) -> Shell:
    """A home where `legal` has two versions and points to the second."""
    base = tiny_folders["llama"]
    shell = Shell(tmp_path / "home", base)
    for seed in (1, 2):
        folder = save_random_adapter(tmp_path / f"adapter{seed}", base, seed=seed)
        shell.json("adapters", "import", str(folder), "--alias", "legal")
    return shell


def test_help_imports_nothing_heavy_when_printed() -> None:
    """`hotswap --help` stays quick because no model library is imported for it."""
    code = (
        "import sys; from clients.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'litserve', 'httpx'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "experiments" in result.stdout


def test_adapters_list_shows_what_aliases_point_to_when_imported(shell: Shell) -> None:
    """One line an alias, in JSON with all of its fields."""
    (alias,) = shell.json("adapters", "list")
    assert (alias["name"], alias["current"]["label"], alias["num_versions"]) == ("legal", "legal@v2", 2)
    assert "legal" in shell.text("adapters", "list")


def test_promote_and_rollback_move_the_alias_when_asked(shell: Shell) -> None:
    """Promote names a version; rollback goes back to where the alias was before."""
    assert shell.json("adapters", "promote", "legal@v1")["current"]["label"] == "legal@v1"
    assert shell.json("adapters", "rollback", "legal")["current"]["label"] == "legal@v2"
    history = shell.json("adapters", "show", "legal")["history"]
    assert [change["action"] for change in history] == ["publish", "publish", "promote", "rollback"]


def test_exported_version_is_the_same_version_when_imported_again(shell: Shell, tmp_path: Path) -> None:
    """Content addressing survives the round trip: the same digest, no new number."""
    shell.text("adapters", "export", "legal@v1", str(tmp_path / "exported"))
    imported = shell.json("adapters", "import", str(tmp_path / "exported"), "--alias", "legal", "--no-promote")
    assert imported["version"]["label"] == "legal@v1"


def test_export_refuses_an_existing_folder_when_asked(shell: Shell, tmp_path: Path) -> None:
    """Nothing of the user's is overwritten."""
    with pytest.raises(HotswapError, match="exists already"):
        shell.text("adapters", "export", "legal", str(tmp_path))


def test_import_refuses_another_base_models_adapter_when_fingerprints_differ(
    shell: Shell, tmp_path: Path, tiny_folders: dict[str, Path]
) -> None:
    """A version exported from one base model is refused on another, with both fingerprints in the message."""
    shell.text("adapters", "export", "legal@v1", str(tmp_path / "exported"))
    other = Shell(tmp_path / "other-home", tiny_folders["qwen2"])
    with pytest.raises(HotswapError, match=r"fingerprint [0-9a-f]{64}.* has [0-9a-f]{64}"):
        other.text("adapters", "import", str(tmp_path / "exported"), "--alias", "legal")


def test_remove_deletes_a_version_when_nothing_points_to_it(shell: Shell) -> None:
    """A version that is not live can go; the live one can't."""
    assert shell.json("adapters", "remove", "legal@v1", "--yes") == {"removed": ["legal@v1"]}
    with pytest.raises(HotswapError, match="points to v2"):
        shell.text("adapters", "remove", "legal@v2", "--yes")


def test_serve_is_refused_at_once_when_something_is_in_its_way(shell: Shell) -> None:
    """A server on the same home, or a program on the port: an error, and no word of a server that is not there."""
    with held_home(Path(shell.environment["HOTSWAP_HOME"]), address="http://127.0.0.1:9000"):
        refused = CliRunner().invoke(app, ["serve"], env=shell.environment)
    assert ("", f"process {os.getpid()} on http://127.0.0.1:9000") == (refused.output, _held_by(refused.exception))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        refused = CliRunner().invoke(app, ["serve", "--port", str(other.getsockname()[1])], env=shell.environment)
    assert ("", True) == (refused.output, "another program listens" in str(refused.exception))


def _held_by(error: BaseException | None) -> str:
    return str(error).split(": ")[1].split(";")[0]


def test_experiments_are_created_shown_and_stopped_when_asked(shell: Shell) -> None:
    """The documented form with several arms behind one --arms works; the table names every arm."""
    created = shell.json("experiments", "create", "legal", "--arms", "A@v1=30", "B@v2=70")
    assert [(arm["name"], arm["number"], arm["weight"]) for arm in created["arms"]] == [("A", 1, 30), ("B", 2, 70)]
    shown = shell.text("experiments", "show", "legal")
    assert all(text in shown for text in (created["id"], "legal@v1", "legal@v2", "30 %", "70 %"))
    assert created["id"] in shell.text("experiments", "list")
    assert [created["id"]] == [found["id"] for found in shell.json("experiments", "list")]
    assert shell.json("experiments", "stop", "legal")["state"] == "stopped"


def test_experiment_lives_its_life_when_driven_by_command(shell: Shell, tmp_path: Path) -> None:
    """A file, a draft, its start, other weights, their undoing, a log of it all."""
    config = tmp_path / "legal.yaml"
    config.write_text(
        "alias: legal\narms: [{name: A, version: v1, weight: 50}, {name: B, version: v2, weight: 50}]\n"
        "metric: {name: solved}\ntraffic: 20\nends_at: 2090-01-31T00:00:00Z\n"
    )
    assert "hotswap experiments start exp-" in shell.text("experiments", "create", "--config", str(config), "--draft")
    (draft,) = shell.json("experiments", "list", "--state", "draft")
    assert ({"name": "solved", "direction": "increase", "kind": "number"}, 20, "2090-01-31T00:00:00+00:00") == (
        draft["metric"], draft["traffic"], draft["ends_at"],
    )  # fmt: skip
    started = shell.text("experiments", "start", "legal")
    assert "runs on legal for 20 % of the users: A = legal@v1 (50 %)" in started
    changed = shell.text("experiments", "weights", "legal", "A=90", "B=10", "--traffic", "40", "--reason", "careful")
    assert "is in stage 2: A = legal@v1 (90 %), B = legal@v2 (10 %)" in changed
    assert "is running: undid: careful" in shell.text("experiments", "undo", "legal")
    assert 20 == shell.json("experiments", "list")[0]["traffic"]
    assert "stopped" == shell.json("experiments", "stop", "legal")["state"]
    assert ["create", "start", "change_weights", "undo", "stop"] == [
        item["action"] for item in shell.json("experiments", "log", draft["id"])
    ]
    assert "careful" in shell.text("experiments", "log", "legal")
    assert "5 % of the users of legal are in no experiment" in shell.text("experiments", "holdout", "legal", "5")
    assert {"alias": "legal", "percent": 5} == shell.json("experiments", "holdout", "legal")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alias: legal\narms: []\nmetrics: 1\n", r"arms: .*; metrics: no such field"),
        ("[]", "the file: "),
        ("a: [", "while parsing"),
        (
            "{alias: legal, arms: [{name: A, version: v1, weight: 50}], ends_at: 2090-01-31T00:00:00}",
            "ends_at: .*timezone",
        ),
    ],
)
def test_experiments_file_is_refused_when_it_is_wrong(shell: Shell, tmp_path: Path, content: str, message: str) -> None:
    """File and field are named, and nothing is started."""
    config = tmp_path / "wrong.yaml"
    config.write_text(content)
    with pytest.raises(HotswapError, match=rf"wrong\.yaml: (?s:.)*{message}"):
        shell.text("experiments", "create", "--config", str(config))
    assert [] == shell.json("experiments", "list")


def test_experiments_are_refused_when_options_contradict(shell: Shell, tmp_path: Path) -> None:
    """Neither arms nor a file, both, a state that is none, weights of another shape."""
    for command, message in (
        (("create", "legal"), "expected an alias and --arms, or --config"),
        (("create", "legal", "--config", "x.yaml"), "--config says all of the experiment"),
        (("create", "--config", str(tmp_path / "absent.yaml")), "No such file"),
        (("list", "--state", "over"), "expected one of draft, running, stopped, decided, found 'over'"),
        (("weights", "legal", "A"), "expected NAME=PERCENT"),
    ):
        with pytest.raises(HotswapError, match=message):
            shell.text("experiments", *command)


def test_unknown_key_in_the_config_file_is_an_error_when_loaded(shell: Shell) -> None:
    """A misspelt setting is named, not ignored."""
    Path(shell.environment["HOTSWAP_HOME"], "hotswap.toml").write_text("devise = 'cpu'\n")
    with pytest.raises(HotswapError, match="devise"):
        shell.text("adapters", "list")


def test_what_is_logged_is_a_line_for_people_when_a_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, beside what the command prints; details stay in the server's log."""
    before = structlog.get_config()
    try:
        tell_people()
        log = structlog.get_logger()
        log.debug("looked_up")
        log.info("fetching_the_base_model", name="tiny", megabytes=93)
    finally:
        structlog.configure(**before)
    assert ("", "fetching the base model (name tiny, megabytes 93)\n") == tuple(capsys.readouterr())


def test_doctor_says_what_it_found_when_run(shell: Shell) -> None:
    """Every topic has a state and a sentence."""
    findings = {finding["topic"]: finding for finding in shell.json("doctor")}
    assert findings["base model"]["state"] == "ok"
    assert set(findings) >= {"python", "memory", "torch", "device", "bitsandbytes", "compiler", "config"}


def test_doctor_fails_when_the_home_is_too_small(shell: Shell, tmp_path: Path) -> None:
    """Nothing can be trained in a megabyte: what is missing is said, and how much it takes."""
    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        environment = {**shell.environment, "HOTSWAP_HOME": str(disk / "home"), "HOTSWAP_BASE": "smollm2-135m"}
        result = CliRunner().invoke(app, ["doctor"], env=environment)
    assert 1 == result.exit_code
    (line,) = [line for line in result.stdout.splitlines() if " home " in line]
    assert line.startswith(
        f"missing home         {disk}/home, 1.0 MB free: too little, a training run and the base model"
    )
    assert line.endswith("may take 580.0 MB")


@pytest.mark.parametrize("name", ["VERSION", "INSTALL_COMPLETION", "SHOW_COMPLETION", "HELP"])
def test_command_runs_when_a_variable_is_called_as_an_option_of_the_root(shell: Shell, name: str) -> None:
    """Deployments name an image's tag HOTSWAP_VERSION; it must not turn every command into --version."""
    shell.environment[f"HOTSWAP_{name}"] = "1"
    assert [alias["name"] for alias in shell.json("adapters", "list")] == ["legal"]


def test_base_list_names_the_embedded_model_when_nothing_is_fetched(shell: Shell) -> None:
    """The embedded base model is offered before it is there."""
    assert shell.json("base", "list") == [{"name": "smollm2-135m", "folder": None, "fetched": False}]


def test_training_reports_bad_data_before_it_loads_anything_when_a_line_is_wrong(shell: Shell, tmp_path: Path) -> None:
    """File, line and field are named."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": 1}]}\n')
    with pytest.raises(HotswapError, match=r"bad\.jsonl:1: field messages\[0\]\.content"):
        shell.text("train", "legal", "--data", str(data))


def test_training_refuses_a_share_when_validation_data_is_given_too(shell: Shell, tmp_path: Path) -> None:
    """Only one of both can be meant; the home's own share, which is for runs without a file, is no contradiction."""
    data = write_rows(tmp_path / "rows.jsonl", easy_rows(2))
    with pytest.raises(ConfigurationError, match=r"validation_share holds out rows of .*rows\.jsonl.*one of both"):
        shell.text("train", "legal", "--data", str(data), "--validation", str(data), "--validation-share", "0.1")
    run = tmp_path / "run.yaml"
    run.write_text("alias: legal\ndata: rows.jsonl\nvalidation: rows.jsonl\nvalidation_share: 0.1\n")
    with pytest.raises(ConfigurationError, match="give one of both"):
        shell.text("train", "--config", str(run))


def test_key_is_printed_once_when_it_is_made(shell: Shell) -> None:
    """The secret alone goes to standard output, so that a script can keep it; lists don't have it."""
    assert [] == shell.json("keys", "list")
    options = [
        "--scope",
        "chat",
        "--scope",
        "feedback",
        "--alias",
        "legal",
        "--expires",
        "30d",
        "--max-concurrent",
        "3",
    ]
    secret = shell.text("keys", "create", "[/web]", *options).strip()
    (key,) = shell.json("keys", "list")
    assert secret.startswith(f"hs-{key['id'].removeprefix('key-')}-")
    assert (["chat", "feedback"], ["legal"], 3) == (key["scopes"], key["aliases"], key["limits"]["max_concurrent"])
    listed = shell.text("keys", "list")
    assert "until " in listed
    assert "[/web]" in listed
    assert secret[16:] not in listed + json.dumps(key)


def test_key_is_made_with_a_warning_when_an_alias_does_not_exist(shell: Shell) -> None:
    """It may come later, or be mistyped; what exists is not warned of."""
    options = ["keys", "create", "web", "--alias"]
    made = CliRunner().invoke(app, [*options, "legal", "--alias", "leagl"], env=shell.environment)
    assert 0 == made.exit_code
    assert "there is no adapter leagl yet" in made.stderr
    made = CliRunner().invoke(app, [*options, "legal", "--alias", "base"], env=shell.environment)
    assert "there is no adapter" not in made.stderr


def test_ids_are_whole_when_the_terminal_is_narrow(shell: Shell, tmp_path: Path) -> None:
    """They are there to be copied: no table and no list cuts or wraps them, nor the names of versions."""
    shell.environment["COLUMNS"] = "40"
    key = shell.json("keys", "create", "a name of some length", "--alias", "legal", "--expires", "30d")["key"]["id"]
    job = _add_job(shell, tmp_path)
    experiment = shell.json("experiments", "create", "legal", "--arms", "A@v1=30", "B@legal@v2=70")["id"]
    digest = shell.json("adapters", "show", "legal")["version"]["version"]["digest"]
    for command, expected in {
        ("jobs", "list"): [job, "legal", "validating_files"],
        ("jobs", "show", job): [job],
        ("keys", "list"): [key],
        ("adapters", "list"): ["legal@v2", experiment],
        ("adapters", "show", "legal"): [digest, "legal@v1", "legal@v2 (live)"],
        ("experiments", "list"): [experiment],
        ("experiments", "show", "legal"): [experiment, "legal@v1", "legal@v2"],
        ("audit",): [key, job, experiment, "legal@v1"],
    }.items():
        printed = shell.text(*command)
        assert [] == [text for text in expected if text not in printed], printed


def test_lists_fit_a_terminal_of_eighty_columns_when_names_are_usual(shell: Shell, tmp_path: Path) -> None:
    """No line is longer than what everybody's terminal shows."""
    shell.environment["COLUMNS"] = "80"
    shell.json("keys", "create", "web", "--alias", "legal", "--expires", "30d", "--max-concurrent", "3")
    _add_job(shell, tmp_path)
    shell.json("experiments", "create", "legal", "--arms", "A@v1=30", "B@v2=70")
    for command in (("jobs", "list"), ("keys", "list"), ("adapters", "list"), ("experiments", "list")):
        lines = shell.text(*command).splitlines()
        assert len(lines) > 3
        assert max(map(len, lines)) <= 80, lines


def test_version_is_found_when_it_is_named_either_way(shell: Shell) -> None:
    """`legal@v1`, or `legal` and `v1`; what is shown is always the first."""
    assert "legal answers with legal@v1 now" in shell.text("adapters", "promote", "legal", "v1")
    assert "legal answers with legal@v2 now" in shell.text("adapters", "promote", "legal@v2")
    assert "legal@v1" == shell.json("adapters", "show", "legal", "v1")["version"]["label"]
    with pytest.raises(HotswapError, match="'support@v1' is no version of 'legal'"):
        shell.text("adapters", "promote", "legal", "support@v1")
    assert {"removed": ["legal@v1"]} == shell.json("adapters", "remove", "legal", "v1", "--yes")


def test_pins_are_kept_when_they_are_made_by_command(shell: Shell) -> None:
    """An alias's, and a version's; the settings say how many there may be."""
    assert {"pinned": ["legal"]} == shell.json("adapters", "pin", "legal")
    assert "pinned: legal, legal@v1" in shell.text("adapters", "pin", "legal", "v1")
    assert {"pinned": ["legal@v1"]} == shell.json("adapters", "unpin", "legal")
    shell.environment["HOTSWAP_SERVE_SLOTS"] = "2"
    with pytest.raises(HotswapError, match="2 versions would be pinned; at most 1"):
        shell.text("adapters", "pin", "legal@v2")
    assert "pinned: none" in shell.text("adapters", "unpin", "legal@v1")


def test_archive_of_an_export_is_the_same_version_when_imported(shell: Shell, tmp_path: Path) -> None:
    """What the API exports, the command line takes."""
    home = Path(shell.environment["HOTSWAP_HOME"])
    found = shell.json("adapters", "show", "legal@v1")["version"]["version"]
    archive = tmp_path / "legal.tar"
    archive.write_bytes(b"".join(VersionArchive(ArtifactStore(home / "store"), found["digest"])))
    imported = shell.json("adapters", "import", str(archive), "--alias", "copy")
    assert ("copy@v1", found["digest"]) == (imported["version"]["label"], imported["version"]["version"]["digest"])


def test_key_may_chat_alone_when_no_scope_is_given(shell: Shell) -> None:
    """The least that is of use; the secret is in the JSON document too."""
    made = shell.json("keys", "create", "web")
    assert ["chat"] == made["key"]["scopes"]
    assert made["key"]["aliases"] is None
    assert made["secret"].startswith("hs-")


def test_key_is_shown_as_revoked_when_it_was(shell: Shell) -> None:
    """It stays in the list."""
    key = shell.json("keys", "create", "web")["key"]
    assert shell.json("keys", "revoke", key["id"])["revoked_at"] is not None
    assert "revoked" in shell.text("keys", "list")
    with pytest.raises(HotswapError, match=r"revoked at .* already"):
        shell.text("keys", "revoke", key["id"])


def test_audit_shows_what_the_command_line_did_when_asked(shell: Shell) -> None:
    """Newest first, by whom and to what."""
    shell.json("adapters", "promote", "legal@v1")
    key = shell.json("keys", "create", "web")["key"]
    entries = shell.json("audit")
    assert [
        ("create_key", key["id"]),
        ("promote", "legal"),
        ("import", "legal@v2"),
        ("import", "legal@v1"),
    ] == [(entry["action"], entry["subject"]) for entry in entries]
    assert {"command line"} == {entry["actor"] for entry in entries}
    assert entries[:1] == shell.json("audit", "--limit", "1")
    printed = shell.text("audit")
    assert "create key" in printed
    assert key["id"] in printed


def test_serve_says_what_to_do_when_others_could_reach_it_without_keys(shell: Shell) -> None:
    """It ends before it says that it serves."""
    result = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"], env=shell.environment)
    assert isinstance(result.exception, ConfigurationError)
    assert "hotswap keys create NAME" in str(result.exception)
    assert "Hotswap on" not in result.output


def test_resume_is_refused_when_as_many_jobs_wait_as_the_settings_allow(shell: Shell, tmp_path: Path) -> None:
    """The command line is bound by the server's setting, as the API is."""
    paused = _add_job(shell, tmp_path)
    shell.text("jobs", "pause", paused)
    _add_job(shell, tmp_path)
    environment = {**shell.environment, "HOTSWAP_SERVE_MAX_QUEUED_JOBS": "1"}
    result = CliRunner().invoke(app, ["jobs", "resume", paused], env=environment)
    assert isinstance(result.exception, OverloadedError)
    assert "paused" == shell.json("jobs", "show", paused)["status"]


def test_jobs_are_listed_and_turned_when_asked(shell: Shell, tmp_path: Path) -> None:
    """The commands see what the API has queued, and what they do is what the API reports."""
    job = _add_job(shell, tmp_path)
    assert [found["id"] for found in shell.json("jobs", "list")] == [job]
    assert job in shell.text("jobs", "list")
    assert shell.json("jobs", "pause", job)["status"] == "paused"
    assert shell.json("jobs", "resume", job)["status"] == "validating_files"
    assert "cancelled" in shell.text("jobs", "cancel", job)
    assert shell.json("jobs", "show", job)["status"] == "cancelled"
    messages = [event["message"] for event in shell.json("jobs", "events", job)]
    assert messages[1:] == ["The job was paused", "The job was resumed", "The job was cancelled"]
    assert "info  The job was paused" in shell.text("jobs", "events", job)


def _add_job(shell: Shell, tmp_path: Path) -> str:
    """What the API queues for `legal`; its id."""
    home = Path(shell.environment["HOTSWAP_HOME"])
    database = open_database(f"sqlite:///{home / 'hotswap.db'}")
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(2)).read_bytes()
    stored = FileService(database, home / "files", max_bytes=10_000).upload(io.BytesIO(rows), "rows.jsonl")
    method = {"type": "supervised", "supervised": {"hyperparameters": {}}}
    job = JobService(database).create(JobOrder("tiny", stored.id, method, 0, alias="legal"))
    database.close()
    return job.id


def test_job_is_drawn_when_it_has_been_measured(shell: Shell) -> None:
    """Both curves, from the job's own events; without the flag there is none."""
    jobs = JobService(open_database(f"sqlite:///{shell.environment['HOTSWAP_HOME']}/hotswap.db"))
    files = FileService(jobs.database, Path(shell.environment["HOTSWAP_HOME"]) / "files", max_bytes=100_000)
    rows = "".join(json.dumps({"messages": row}) + "\n" for row in easy_rows(2))
    file_id = files.upload(io.BytesIO(rows.encode()), "rows.jsonl").id
    method = {"type": "supervised", "supervised": {"hyperparameters": {}}}
    job = jobs.create(JobOrder("tiny", file_id, method, 0, alias="legal"))
    pass_all(jobs)
    claim = jobs.claim(lease_s=60)
    assert claim is not None
    for step in (1, 2, 3):
        data = {"step": step, "total_steps": 3, "train_loss": 3.0 - step, "valid_loss": 2.0 if step > 1 else None}
        jobs.note_metrics(claim, f"Step {step}/3", data, trained_tokens=step, seconds_left=0)
    shown = shell.text("jobs", "show", job.id, "--plot")
    assert "training loss (nats a token), 0.000 to 2.000, steps 1 to 3" in shown
    assert "validation loss (nats a token), 2.000 to 2.000, steps 2 to 3" in shown
    assert any("\u2801" <= letter <= "\u28ff" for letter in shown)
    assert "training loss," not in shell.text("jobs", "show", job.id)


def test_job_says_what_its_version_is_when_it_has_made_one(shell: Shell, tmp_path: Path) -> None:
    """The alias answers with it, or with another by now, or it is gone; each with what to do."""
    job_id = _add_job(shell, tmp_path)
    jobs = JobService(open_database(f"sqlite:///{shell.environment['HOTSWAP_HOME']}/hotswap.db"))
    pass_all(jobs)
    claim = jobs.claim(lease_s=60)
    assert claim is not None
    with jobs.database.write() as session:
        result = jobs.get(job_id).training_file
        jobs.succeed(session, claim, fine_tuned_model="legal@v2", result_file=result, trained_tokens=1)

    live = shell.text("jobs", "show", job_id).splitlines()[-1]
    shell.text("adapters", "promote", "legal@v1")
    other = shell.text("jobs", "show", job_id).splitlines()[-1]
    shell.text("adapters", "remove", "legal@v2", "--yes")

    assert 'legal answers with legal@v2 now. Try: hotswap chat legal "..." (with hotswap serve running)' == live
    ways = 'Try: hotswap adapters promote legal@v2 or hotswap chat legal@v2 "..."'
    assert f"legal@v2 is published; legal stands for legal@v1. {ways}" == other
    assert "legal@v2 was removed since" == shell.text("jobs", "show", job_id).splitlines()[-1]


def test_unpromoted_alias_is_shown_when_nothing_of_it_is_live(shell: Shell, tmp_path: Path) -> None:
    """`list` says what to do, `show` knows the version by its name, and promoting makes it an alias as any other."""
    folder = save_random_adapter(tmp_path / "other", Path(shell.environment["HOTSWAP_BASE"]), seed=9)
    shell.json("adapters", "import", str(folder), "--alias", "medical", "--no-promote")
    listed = shell.text("adapters", "list")
    assert "medical: no version has been promoted; the newest is medical@v1 (hotswap adapters promote" in listed
    assert "legal" in listed
    assert shell.json("adapters", "show", "medical@v1")["live"] is None
    with pytest.raises(HotswapError, match="no version of 'medical' has been promoted"):
        shell.text("adapters", "show", "medical")
    shell.text("adapters", "promote", "medical@v1")
    assert shell.json("adapters", "show", "medical")["live"] == 1


def test_train_ends_with_what_its_losses_say_when_they_still_fell(shell: Shell, tmp_path: Path) -> None:
    """As a sentence between the gate and the folder; a reader of `passed` might take the run for done."""
    data = write_rows(tmp_path / "rows.jsonl", easy_rows(4))
    few = ["--max-steps", "4", "--rank", "2", "--learning-rate", "1e-2", "--warmup-steps", "0"]
    quick = ["--gate-samples", "0", "--sample-prompts", "0"]
    printed = shell.text("train", "legal", "--data", str(data), "--validation", str(data), *few, *quick).splitlines()
    (said,) = (number for number, line in enumerate(printed) if "was still falling at the last step, to " in line)
    assert printed[said].startswith("The validation loss was still falling")
    assert printed[said].endswith("; training longer would probably pay.")
    assert printed[said + 1].startswith("metrics, sampled answers and curves are in ")


def test_gate_is_printed_when_a_version_was_trained(shell: Shell, tmp_path: Path) -> None:
    """As a table behind the run and by `show`; the alias, which has a version, is not moved without validation rows."""
    data = write_rows(tmp_path / "train.jsonl", easy_rows(4))
    flags = [
        "--max-steps",
        "2",
        "--rank",
        "2",
        "--gate-samples",
        "0",
        "--sample-prompts",
        "0",
        "--gate-forgetting",
        "99",
    ]
    printed = shell.text("train", "legal", "--data", str(data), *flags)
    assert "the gate: inconclusive" in printed
    assert "legal was not moved to it" in printed
    *_, cure, promotion = printed.splitlines()
    assert cure == "What usually mends it: give 8 validation rows or more: a validation file, or validation_share."
    assert promotion == "Or, all the same: hotswap adapters promote legal@v3"
    assert "training loss (nats a token), " in printed
    shown = shell.text("adapters", "show", "legal@v3")
    assert "not compared with legal@v2: there is no validation file" in shown
    assert "What usually mends it: give 8 validation rows or more" in shown
    report = shell.json("adapters", "show", "legal@v3")["manifest"]["gate"]
    assert {check["name"]: check["outcome"] for check in report["checks"]} == {
        "base": "unchecked",
        "present": "unchecked",
        "forgetting": "passed",
        "sampling": "unchecked",
    }
    assert (
        shell.json("train", "legal", "--data", str(data), *flags, "--no-promote")["gate"]["verdict"] == "inconclusive"
    )


def test_promotion_says_so_when_the_gate_was_not_passed(shell: Shell, tmp_path: Path) -> None:
    """In a line behind the new state; and going back where there is nothing earlier names what can be done."""
    data = write_rows(tmp_path / "train.jsonl", easy_rows(4))
    flags = ("--max-steps", "1", "--rank", "2", "--gate-samples", "0", "--sample-prompts", "0")
    shell.text("train", "worse", "--data", str(data), *flags, "--gate-format-regex", "x")
    said, why = shell.text("adapters", "promote", "worse@v1").splitlines()
    assert said == "worse answers with worse@v1 now"
    assert why.startswith("worse@v1 was promoted all the same: the gate was not passed: the format was not checked")
    with pytest.raises(HotswapError, match="no earlier version to roll back to; promote another of its versions"):
        shell.text("adapters", "rollback", "worse")


def test_job_is_queued_from_files_when_created(shell: Shell, tmp_path: Path) -> None:
    """As by the API, on the table that a server of this home reads; hyperparameters are those of the wire."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(2))
    options = ("--data", str(rows), "--validation", str(rows), "--suffix", "legal", "--model", "legal@v1")
    job = shell.json(
        "jobs", "create", *options, "--set", "rank=4", "--set", "n_epochs=auto", "--seed", "5", "--priority", "7"
    )
    assert (job["status"], job["alias"], job["model"]) == ("validating_files", "legal", "legal@v1")
    assert (job["seed"], job["priority"], job["method"]["supervised"]["hyperparameters"]["rank"]) == (5, 7, 4)
    assert "validating_files" in shell.text("jobs", "create", "--data", str(rows))
    assert len(shell.json("jobs", "list")) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "rank=17"), "rank 17 is above 16"),
        (("--set", "rank=x"), "method.supervised.hyperparameters.rank: Input should be a valid integer"),
        (("--set", "rank"), "expected NAME=VALUE"),
        (("--model", "nobody"), "model: expected the base model"),
        (("--method", "dpo"), "trained on preference rows"),
        (("--validation", "nowhere.jsonl"), "nowhere.jsonl: can't be read: No such file"),
    ],
)
def test_job_is_refused_with_its_reason_when_created(
    shell: Shell, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """Nothing is queued, and no file stays."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(2))
    with pytest.raises(HotswapError, match=message):
        shell.text("jobs", "create", "--data", str(rows), *options)
    assert shell.json("jobs", "list") == []
    assert [path for path in (tmp_path / "home" / "files").glob("*") if path.is_file()] == []


def test_job_says_that_the_disk_is_full_when_it_can_not_be_created(shell: Shell, tmp_path: Path) -> None:
    """It is not the user's file that fails; the home's place is named, and nothing is queued."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(2) * 2000)
    with small_disk(tmp_path / "home" / "files", kilobytes=64):
        with pytest.raises(StorageFullError, match=r"^no space left for the file; nothing of it was kept") as caught:
            shell.text("jobs", "create", "--data", str(rows))
        assert caught.value.__notes__[0].startswith(f"the disk of {tmp_path}/home/files has 0.")
    assert [] == shell.json("jobs", "list")


def test_job_says_what_it_waits_for_when_nobody_works_on_it(shell: Shell, tmp_path: Path) -> None:
    """Without a server for one; with it for the check of its files, and for its turn; at its end for nothing."""
    home, rows = tmp_path / "home", write_rows(tmp_path / "rows.jsonl", easy_rows(2))
    created = shell.text("jobs", "create", "--data", str(rows))
    assert "no server runs on this home folder: hotswap serve checks its files and trains it" in created
    (job,) = shell.json("jobs", "list")
    waiting = [shell.text("jobs", "show", job["id"])]
    with held_home(home, address="http://127.0.0.1:8000"):
        waiting.append(shell.text("jobs", "show", job["id"]))
        database = open_database(f"sqlite:///{home / 'hotswap.db'}")
        pass_all(JobService(database))
        waiting.append(shell.text("jobs", "show", job["id"]))
        database.close()
        assert "the server on this home folder checks" in shell.text("jobs", "create", "--data", str(rows))
    expected = ("waits for a server: hotswap serve", "its files are being checked", "waits for its turn")
    assert [True] * 3 == [words in " ".join(shown.split()) for words, shown in zip(expected, waiting, strict=True)]
    assert " - " not in " ".join(waiting)
    cancelled = shell.text("jobs", "cancel", job["id"])
    assert "how far" not in cancelled
    assert "rows.jsonl" in cancelled


def test_job_shows_losses_checkpoints_and_warnings_when_it_runs(shell: Shell, tmp_path: Path) -> None:
    """How far it is, when it will be done, and what its owner should know."""
    rows = write_rows(tmp_path / "rows.jsonl", easy_rows(2))
    job_id = shell.json("jobs", "create", "--data", str(rows), "--suffix", "legal")["id"]
    database = open_database(f"sqlite:///{tmp_path / 'home' / 'hotswap.db'}")
    jobs = JobService(database)
    pass_all(jobs)
    assert "place in the queue" in shell.text("jobs", "show", job_id)
    claim = jobs.claim(lease_s=60)
    assert claim is not None
    jobs.note(claim, "training_file: 3 rows appear twice", level="warn")
    jobs.note(claim, "Loading the base model tiny (none)")
    assert "Loading the base model tiny" in shell.text("jobs", "show", job_id)
    for step in range(1, 9):
        data = {"step": step, "total_steps": 9, "train_loss": 1 / step} | ({"valid_loss": 0.625} if step == 2 else {})
        jobs.note_metrics(claim, f"Step {step}", data, trained_tokens=step, seconds_left=90)
    jobs.add_checkpoint(claim, 2, {}, digest="a" * 64)
    database.close()
    shown = shell.text("jobs", "show", job_id)
    assert "step 8 of 9, loss 0.125, about" in " ".join(shown.split())
    for part in ("running", "2/9", "0.625", "8/9", "0.125", "warning: training_file: 3 rows appear twice"):
        assert part in shown, part
    assert f"legal:{job_id[6:18]}:ckpt-step-2" in shown
    assert "3/9" not in shown
