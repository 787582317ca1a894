"""What killed servers leave of uploads. What uploads do is tested with their routes."""

from __future__ import annotations

from pathlib import Path

from server.uploads import sweep_uploads


def test_sweep_deletes_what_was_arriving_when_a_server_was_killed(tmp_path: Path) -> None:
    """Whole folders, whatever is in them, and nothing else of the home."""
    for name in ("a", "b"):
        folder = tmp_path / "uploads" / name
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(b"x")
    (tmp_path / "files").mkdir()
    assert 2 == sweep_uploads(tmp_path)
    assert ["files", "uploads"] == sorted(path.name for path in tmp_path.iterdir())
    assert [] == list((tmp_path / "uploads").iterdir())


def test_sweep_does_nothing_when_there_is_no_home_yet(tmp_path: Path) -> None:
    """The first start."""
    assert 0 == sweep_uploads(tmp_path / "none")
