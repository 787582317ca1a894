"""The demo from end to end on a tiny base model, twice: the second run finds everything there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import make_home


@pytest.mark.timeout(900)
def test_demo_runs_whole_and_reuses_its_work_when_run_twice(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Exit code 0 both times; four versions after the first run and still four after the second."""
    home = make_home(tmp_path / "home", tiny_folders["llama"], HOTSWAP_SERVE_SLOTS="4")
    first = home.try_run("demo", "--steps", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "support@v2" in first.stdout
    second = home.try_run("demo", "--steps", "3")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "trained before on the same data" in second.stdout
    aliases = {alias["name"]: alias for alias in home.run("adapters", "list")}
    assert {name: alias["num_versions"] for name, alias in aliases.items()} == {"legal": 1, "medical": 1, "support": 2}
    assert aliases["support"]["current"]["label"] == "support@v2"
