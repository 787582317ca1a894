"""The example runs, each by the command that its file names, on a tiny model and for a single step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from adapters.errors import ConfigurationError
from adapters.methods import ROW_KINDS, SAMPLING_METHODS
from clients.cli.main import app
from training.formats import read_dataset

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_RUNS = sorted(path.stem for path in _EXAMPLES.glob("*.yaml"))
# A single step of few short answers; the validation rows and most others would only cost time.
_SMALL = ["--max-steps", "1", "--rank", "4", "--batch-size", "4", "--learning-rate", "1e-3"]
_SMALL += ["--promote", "always", "--sample-prompts", "0"]
_FEW_ANSWERS = ["--gate-samples", "1", "--gate-sample-tokens", "2"]  # which a reward model gives none of


class Shell:
    """`hotswap train` in this process, on one home folder."""

    def __init__(self, home: Path, base: Path) -> None:
        self._environment = {"HOTSWAP_HOME": str(home), "HOTSWAP_BASE": str(base), "HOTSWAP_QUANTISATION": "none"}

    def train(self, *arguments: str) -> Any:
        """Run the command and return the document that it printed."""
        result = CliRunner().invoke(app, ["train", *arguments, "--json"], env=self._environment)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


def _answers(name: str) -> list[str]:
    sampled = ["--max-answer-tokens", "2"] if name in SAMPLING_METHODS else []
    return [] if name == "reward" else [*_FEW_ANSWERS, *sampled]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Shell:
    """A home in which the first two runs of the chain have been made."""
    shell = Shell(tmp_path_factory.mktemp("examples"), tiny_folders["llama"])
    for name in ("sft", "reward"):
        shell.train("--config", str(_EXAMPLES / f"{name}.yaml"), *_SMALL, *_answers(name))
    return shell


@pytest.mark.parametrize("name", _RUNS)
def test_example_run_makes_a_version_when_its_command_is_given(shell: Shell, name: str) -> None:
    """Data, rewards and versions are found as the file says."""
    run = yaml.safe_load((_EXAMPLES / f"{name}.yaml").read_text())

    result = shell.train("--config", str(_EXAMPLES / f"{name}.yaml"), *_SMALL, *_answers(name), "--seed", "7")

    assert result["published"]["alias"] == run["alias"]
    assert result["num_steps"] == 1
    assert result["published"]["version"]["kind"] == ("reward" if name == "reward" else "chat")


def test_every_method_has_an_example_when_listed() -> None:
    """One file a method, which says in its first lines what it is for and how it is run."""
    assert sorted(ROW_KINDS) == _RUNS
    for name in _RUNS:
        text = (_EXAMPLES / f"{name}.yaml").read_text()
        assert text.startswith("# ")
        assert f"hotswap train --config examples/{name}.yaml" in text
        assert yaml.safe_load(text)["method"] == name


@pytest.mark.parametrize(("name", "kind"), [("legal.preferences", "preference"), ("support.labels", "labelled")])
def test_example_rows_are_of_their_kind_when_read(name: str, kind: str) -> None:
    """Enough of them to see something move."""
    dataset = read_dataset(_EXAMPLES / f"{name}.jsonl")

    assert dataset.kind == kind
    assert len(dataset.rows) >= 12


def test_flag_wins_when_the_file_says_otherwise(shell: Shell, tmp_path: Path) -> None:
    """The alias and the data by flag, the rest by file; without either the missing one is named."""
    config = tmp_path / "run.yaml"
    config.write_text("method: dpo\nrank: 2\nmax_steps: 5\n")
    data = str(_EXAMPLES / "legal.preferences.jsonl")

    result = shell.train("tone", "--data", data, "--config", str(config), "--max-steps", "1", "--batch-size", "4")

    assert (result["published"]["alias"], result["published"]["number"]) == ("tone", 1)
    assert (result["num_steps"], result["published"]["version"]["rank"]) == (1, 2)
    with pytest.raises(ConfigurationError, match="an ALIAS to publish under is needed"):
        shell.train("--data", data, "--config", str(config))
    with pytest.raises(ConfigurationError, match="--data is needed"):
        shell.train("tone", "--config", str(config))
    with pytest.raises(ConfigurationError, match=r"run\.yaml, with the flags given: setting train\.rank: .*found 0"):
        shell.train("tone", "--data", data, "--config", str(config), "--rank", "0")
