"""The YAML file of one run: what it may say, and what an error names."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters.errors import ConfigurationError
from training.run_file import read_run_file


def _write(folder: Path, content: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_run_file_is_read_when_it_is_right(tmp_path: Path) -> None:
    """Data is looked for beside the file, a reward function too; the rest are settings."""
    (tmp_path / "rows.jsonl").write_text("")
    content = "alias: legal\ndata: rows.jsonl\nvalidation: /else/valid.jsonl\nmap: {user: frage, assistant: antwort}\n"
    path = _write(
        tmp_path, content + "roles: {bot: user}\nsplit: train\nrank: 4\nreward: r.py:polite\nsample_file: rows.jsonl\n"
    )

    run = read_run_file(path)

    assert (run.alias, run.data, run.validation) == ("legal", tmp_path / "rows.jsonl", Path("/else/valid.jsonl"))
    assert (run.mapping, run.split, run.encoding) == (["user=frage", "assistant=antwort"], "train", None)
    assert ["bot=user"] == run.roles
    sampled = f"{tmp_path}/rows.jsonl"
    assert run.settings == {"rank": 4, "reward": f"{tmp_path}/r.py:polite", "sample_file": sampled}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("betta: 0.1", r"unknown key 'betta'; did you mean 'beta'\?"),
        ("zzz: 1", r"unknown key 'zzz'; known: alias, data, validation, map, "),
        ("home: /tmp", "unknown key 'home'"),
        ("1: 2", "unknown key 1"),
        ("rank: 4\nrank: 8", "the key 'rank' is there twice"),
        ("- rank", "expected keys and values .*, found list"),
        ("", "found NoneType"),
        ("alias: [legal]", r"key alias: expected text, found \['legal'\]"),
        ("map: [user]", r"key map: expected columns by name .*found \['user'\]"),
        ("roles: {bot: 3}", r"key roles: expected roles by speaker .*found {'bot': 3}"),
        ("split: 3", "key split: expected text, found 3"),
        ("data: 3", "key data: expected text, found 3"),
        ("rank: {", "is not YAML that can be read"),
        ("rank: !!python/object/apply:os.getcwd []", "is not YAML that can be read"),
        (b"\xff\xfe\x00", "is not YAML that can be read"),
        (b"#" * (1 << 20) + b"\n", "is larger than 1048576 bytes"),
    ],
    ids=repr,
)
def test_run_file_is_named_when_it_is_wrong(tmp_path: Path, content: str | bytes, message: str) -> None:
    """File and key; nothing of it is run."""
    path = _write(tmp_path, content)

    with pytest.raises(ConfigurationError, match=message) as caught:
        read_run_file(path)

    assert str(caught.value).startswith(str(path))


def test_run_file_is_named_when_it_is_not_there(tmp_path: Path) -> None:
    """A misspelt path is the commonest mistake."""
    with pytest.raises(ConfigurationError, match=r"none\.yaml can't be read: No such file"):
        read_run_file(tmp_path / "none.yaml")
