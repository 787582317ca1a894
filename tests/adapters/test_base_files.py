"""A base model's files: where they are, and what identifies them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.base_files import EMBEDDED_BASE, EMBEDDED_BASES, compute_fingerprint, find_base, list_bases, pull_base
from adapters.errors import BaseModelError


@pytest.fixture
def folder(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny base model that a test may change."""
    return shutil.copytree(tiny_folders["llama"], tmp_path / "base", ignore=shutil.ignore_patterns(".*", "home"))


def _set_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _fingerprint(folder: Path, quantisation: str = "none") -> str:
    return compute_fingerprint(folder, quantisation=quantisation)


def test_fingerprint_is_equal_when_computed_again_or_elsewhere(folder: Path, tmp_path: Path) -> None:
    """It depends on content, not on the place, the time or the cache of hashes."""
    first = _fingerprint(folder)
    assert len(first) == 64
    assert first == _fingerprint(folder)
    assert first == _fingerprint(shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns(".*")))


def test_fingerprint_differs_when_one_weight_byte_differs(folder: Path) -> None:
    """Also after the hash of the old weights was kept."""
    before = _fingerprint(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))  # a clock too coarse to tell two writes apart must not decide this test
    assert before != _fingerprint(folder)


def test_fingerprint_differs_when_the_quantisation_differs(folder: Path) -> None:
    """An adapter trained over 4-bit weights belongs to them."""
    assert _fingerprint(folder, "none") != _fingerprint(folder, "nf4")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_fingerprint_differs_when_a_value_in_a_file_differs(folder: Path, name: str) -> None:
    """Config and tokenizer decide what the model computes as much as weights."""
    before = _fingerprint(folder)
    _set_json(folder / name, added_by_the_test=1)
    assert before != _fingerprint(folder)


@pytest.mark.parametrize("content", ["{{ messages }}", None], ids=["changed", "removed"])
def test_fingerprint_differs_when_the_chat_template_differs(folder: Path, content: str | None) -> None:
    """Another template asks with other tokens."""
    before = _fingerprint(folder)
    path = folder / "chat_template.jinja"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert before != _fingerprint(folder)


@pytest.mark.parametrize("key", ["transformers_version", "_name_or_path"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_fingerprint_stays_when_a_library_writes_about_itself(folder: Path, name: str, key: str) -> None:
    """An upgrade of transformers, or another path, orphans no adapter."""
    before = _fingerprint(folder)
    _set_json(folder / name, **{key: "something else"})
    assert before == _fingerprint(folder)


def test_fingerprint_stays_when_keys_are_written_in_another_order(folder: Path) -> None:
    """Formatting is no content."""
    before = _fingerprint(folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(document.items())), indent=7))
    assert before == _fingerprint(folder)


def test_fingerprint_stays_when_the_cache_of_hashes_is_broken(folder: Path) -> None:
    """The cache is a help, never a source."""
    before = _fingerprint(folder)
    (cache,) = folder.glob(".*.sha256")
    for content in ("", "x", "1:1 abc", "a b c"):
        cache.write_text(content)
        assert before == _fingerprint(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_fingerprint_refuses_when_the_folder_holds_no_model(folder: Path, missing: str) -> None:
    """Both kinds of files are expected, and the folder is named."""
    (folder / missing).unlink()
    with pytest.raises(BaseModelError, match=f"{folder} holds no model: expected config.json and"):
        _fingerprint(folder)


def test_find_base_gives_the_folder_when_named_by_path(folder: Path, tmp_path: Path) -> None:
    """A local folder needs no home."""
    assert folder == find_base(str(folder), tmp_path / "home")
    assert folder == pull_base(str(folder), tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("name", "cached"), [(EMBEDDED_BASE, EMBEDDED_BASE), ("org/model", "org--model")])
def test_find_base_gives_the_cached_folder_when_it_was_fetched(
    folder: Path, tmp_path: Path, name: str, cached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedded models and hub ids lie below the home, and fetching again fetches nothing."""
    monkeypatch.chdir(tmp_path)
    target = shutil.copytree(folder, tmp_path / "home" / "bases" / cached)
    assert target == find_base(name, tmp_path / "home")
    assert target == pull_base(name, tmp_path / "home")
    assert (name, target) in list_bases(tmp_path / "home")


def test_find_base_says_how_to_get_it_when_it_is_not_here(tmp_path: Path) -> None:
    """The command to run stands in the message."""
    with pytest.raises(BaseModelError, match="fetch it with: hotswap base pull org/model"):
        find_base("org/model", tmp_path)


@pytest.mark.parametrize("name", ["/none/such", "./none", "../none", "~/none-such", "a/b/c"])
def test_pull_base_refuses_when_a_path_does_not_exist(tmp_path: Path, name: str) -> None:
    """A mistyped path is not looked for on a hub."""
    for act in (find_base, pull_base):
        with pytest.raises(BaseModelError, match=f"folder '{name}' does not exist"):
            act(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pull_base_names_the_embedded_models_when_the_hub_is_out_of_reach(tmp_path: Path) -> None:
    """Offline, an unknown name gives one sentence, and no half-fetched model."""
    with pytest.raises(BaseModelError, match=f"'org/none' is not an embedded base model .{EMBEDDED_BASE}. and could"):
        pull_base("org/none", tmp_path)
    assert list_bases(tmp_path) == [(EMBEDDED_BASE, None)]
    assert [path for path in (tmp_path / "bases").iterdir() if path.is_dir()] == []


def test_embedded_bases_are_pinned_when_listed() -> None:
    """Every one has an exact version, two hashes and a licence."""
    assert EMBEDDED_BASE in EMBEDDED_BASES
    for base in EMBEDDED_BASES.values():
        assert "==" in base.requirement
        assert [len(base.wheel_sha256), len(base.member_sha256)] == [64, 64]
        assert base.licence
