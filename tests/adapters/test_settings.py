"""Settings: flag, environment, file, default, in this order; what is wrong is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from adapters.errors import ConfigurationError
from adapters.settings import CONFIG_FILE_NAME, CoreSettings, resolve_home
from server.config import ServeSettings
from training.config import TrainSettings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine that runs the tests counts."""
    for name in [name for name in os.environ if name.startswith("HOTSWAP_")]:
        monkeypatch.delenv(name)


def _write(home: Path, text: str) -> None:
    (home / CONFIG_FILE_NAME).write_text(text)


def test_core_settings_follow_the_precedence_when_sources_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source overrides those below it, for its own key only."""
    assert CoreSettings.load(tmp_path).base == "smollm2-135m"
    _write(tmp_path, 'base = "from-file"\nquantisation = "none"\n')
    assert (CoreSettings.load(tmp_path).base, CoreSettings.load(tmp_path).quantisation) == ("from-file", "none")
    monkeypatch.setenv("HOTSWAP_BASE", "from-environment")
    assert CoreSettings.load(tmp_path).base == "from-environment"
    resolved = CoreSettings.load(tmp_path, base="from-flag")
    assert (resolved.base, resolved.quantisation, resolved.device) == ("from-flag", "none", "auto")


def test_train_settings_follow_the_precedence_when_sources_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The section reads its own table and its own variables."""
    assert TrainSettings.load(tmp_path).rank == 16
    _write(tmp_path, "[train]\nrank = 4\nseed = 9\n[serve]\nport = 9999\n")
    assert (TrainSettings.load(tmp_path).rank, TrainSettings.load(tmp_path).seed) == (4, 9)
    monkeypatch.setenv("HOTSWAP_TRAIN_RANK", "5")
    assert TrainSettings.load(tmp_path).rank == 5
    resolved = TrainSettings.load(tmp_path, rank=6)
    assert (resolved.rank, resolved.seed) == (6, 9)


def test_serve_settings_follow_the_precedence_when_sources_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same order for the server's section."""
    assert ServeSettings.load(tmp_path).port == 8000
    _write(tmp_path, "[serve]\nport = 8001\n")
    assert ServeSettings.load(tmp_path).port == 8001
    monkeypatch.setenv("HOTSWAP_SERVE_PORT", "8002")
    assert ServeSettings.load(tmp_path).port == 8002
    assert ServeSettings.load(tmp_path, port=8003).port == 8003


def test_flag_overrides_when_its_value_is_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not given is None; nought is a value."""
    monkeypatch.setenv("HOTSWAP_TRAIN_SEED", "7")
    assert TrainSettings.load(tmp_path, seed=0).seed == 0
    assert TrainSettings.load(tmp_path, seed=None).seed == 7


def test_tables_of_other_sections_are_no_unknown_keys_when_the_core_reads_the_file(tmp_path: Path) -> None:
    """One file holds all sections."""
    _write(tmp_path, 'base = "x"\n[train]\nrank = 4\n')
    assert CoreSettings.load(tmp_path).base == "x"


@pytest.mark.parametrize(
    ("section", "text", "message"),
    [
        (CoreSettings, 'bass = "x"\n', "setting bass: Extra inputs are not permitted"),
        (TrainSettings, "[train]\nrnak = 4\n", r"setting train\.rnak: Extra inputs are not permitted"),
        (TrainSettings, "[train]\nrank = 0\n", r"setting train\.rank: .*greater than or equal to 1, found 0"),
        (TrainSettings, '[train]\nrank = "many"\n', r"setting train\.rank: .*found 'many'"),
        (TrainSettings, "[train]\nlearning_rate = nan\n", r"setting train\.learning_rate: .*found nan"),
        (TrainSettings, "train = 3\n", r"\[train\] must be a table, found int"),
        (ServeSettings, "[serve]\nport = 80\n", r"setting serve\.port: .*1024, found 80"),
        (ServeSettings, '[serve]\nhost = "example.org"\n', r"setting serve\.host: .*found 'example.org'"),
        (ServeSettings, "[serve]\nmax_tokens = 4096\n", r"max_tokens \(4096\) must be less than max_context \(2048\)"),
        (CoreSettings, 'quantisation = "int8"\n', "setting quantisation: .*found 'int8'"),
        (CoreSettings, 'base = "x\n', "is not valid TOML"),
        (TrainSettings, "[train\n", "is not valid TOML"),
    ],
)
def test_load_names_the_culprit_when_the_file_is_wrong(
    tmp_path: Path,
    section: type[CoreSettings | TrainSettings | ServeSettings],
    text: str,
    message: str,
) -> None:
    """Key, bound and value stand in the message."""
    _write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message):
        section.load(tmp_path)


def test_load_names_the_file_when_it_is_not_utf8(tmp_path: Path) -> None:
    """A file in another encoding is no TOML."""
    (tmp_path / CONFIG_FILE_NAME).write_bytes(b'base = "\xe9"\n')
    with pytest.raises(ConfigurationError, match=CONFIG_FILE_NAME):
        CoreSettings.load(tmp_path)


def test_load_names_every_culprit_when_several_are_wrong(tmp_path: Path) -> None:
    """One attempt shows all errors."""
    _write(tmp_path, "[train]\nrank = 0\nepochs = -1\n")
    with pytest.raises(ConfigurationError, match=r"(?s)train\.epochs.*; .*train\.rank"):
        TrainSettings.load(tmp_path)


def test_load_names_the_setting_when_the_environment_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable is checked like a file."""
    monkeypatch.setenv("HOTSWAP_TRAIN_EPOCHS", "many")
    with pytest.raises(ConfigurationError, match=r"setting train\.epochs: .*found 'many'"):
        TrainSettings.load(tmp_path)


def test_load_names_the_flag_when_it_is_unknown_or_out_of_bounds(tmp_path: Path) -> None:
    """A flag is checked like a file."""
    with pytest.raises(ConfigurationError, match=r"train\.rnak"):
        TrainSettings.load(tmp_path, rnak=4)
    with pytest.raises(ConfigurationError, match=r"train\.rank: .*found 257"):
        TrainSettings.load(tmp_path, rank=257)


def test_settings_refuse_assignment_when_resolved(tmp_path: Path) -> None:
    """What was logged at start is what holds."""
    with pytest.raises(ValidationError, match="frozen"):
        CoreSettings.load(tmp_path).base = "other"  # type: ignore[misc]


def test_database_url_lies_in_the_home_when_not_given(tmp_path: Path) -> None:
    """SQLite in the home folder, or what was given."""
    assert f"sqlite:///{tmp_path}/hotswap.db" == CoreSettings.load(tmp_path).resolved_database_url
    given = CoreSettings.load(tmp_path, database_url="postgresql://host/db")
    assert given.resolved_database_url == "postgresql://host/db"


def test_resolve_home_follows_the_precedence_when_sources_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flag, the environment, the user's home; always absolute, and nothing is created."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / ".hotswap" == resolve_home()
    monkeypatch.setenv("HOTSWAP_HOME", "~/elsewhere")
    assert tmp_path / "elsewhere" == resolve_home()
    monkeypatch.chdir(tmp_path)
    assert tmp_path / "here" == resolve_home(Path("here"))
    assert list(tmp_path.iterdir()) == []
