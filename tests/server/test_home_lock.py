"""One server a home folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapters.errors import ConfigurationError
from server.home_lock import check_home_free, held_home

URL = "http://127.0.0.1:8000"


def test_home_is_refused_when_another_server_holds_it(tmp_path: Path) -> None:
    """The message says which process, and where it listens; afterwards the home is free."""
    home = tmp_path / "home"
    with held_home(home, address=URL):
        expected = f"process {os.getpid()} on {URL}; use or stop"
        with pytest.raises(ConfigurationError, match=expected) as caught:
            check_home_free(home)
        with pytest.raises(ConfigurationError, match=expected), held_home(home, address="x"):
            pass
        assert "home" == caught.value.param
    check_home_free(home)


def test_home_is_free_when_it_was_only_looked_at(tmp_path: Path) -> None:
    """A look leaves the holder's name as it is, and holds nothing."""
    with held_home(tmp_path, address=URL):
        pass
    check_home_free(tmp_path)
    with held_home(tmp_path, address="http://127.0.0.1:9000"):
        assert f"process {os.getpid()} on http://127.0.0.1:9000" == (tmp_path / "serve.lock").read_text()
