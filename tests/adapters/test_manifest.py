"""The manifest: canonical bytes, one digest for equal content, strict reading."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adapters.errors import IntegrityError
from adapters.gate_report import GateCheck, GateReport
from adapters.manifest import (
    MANIFEST_FILE,
    BaseReference,
    DataReference,
    Manifest,
    hash_file,
    parse_manifest,
    read_manifest,
)
from tests.support.versions import PLAIN_MANIFEST

JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    metrics=st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON_VALUES, max_size=3),
    alpha=st.floats(0.1, 100) | st.integers(1, 64),
)
def test_manifest_keeps_its_digest_when_written_and_read(metrics: dict[str, Any], alpha: float) -> None:
    """Reading gives the same bytes again, whatever was recorded; otherwise no version could be verified."""
    manifest = Manifest.model_validate({**PLAIN_MANIFEST.model_dump(), "alpha": alpha, "metrics": metrics})
    again = Manifest.model_validate_json(manifest.to_bytes())
    assert manifest.to_bytes() == again.to_bytes()
    assert manifest.digest == again.digest


def test_digest_is_sha256_of_the_stored_bytes_when_computed_independently() -> None:
    """The digest can be checked with any tool, and the bytes are sorted JSON."""
    content = PLAIN_MANIFEST.to_bytes()
    assert hashlib.sha256(content).hexdigest() == PLAIN_MANIFEST.digest
    keys = list(json.loads(content))
    assert sorted(keys) == keys


def test_digest_is_equal_when_keys_were_given_in_another_order() -> None:
    """Order of insertion is no content."""
    first = PLAIN_MANIFEST.model_copy(update={"metrics": {"a": 1, "b": 2}})
    second = PLAIN_MANIFEST.model_copy(update={"metrics": {"b": 2, "a": 1}})
    assert first.digest == second.digest


@pytest.mark.parametrize(
    "change",
    [
        {"source": "trained"},
        {"rank": 5},
        {"alpha": 9.0},
        {"target_modules": ["k_proj"]},
        {"base": BaseReference(name="tiny", fingerprint="e" * 64, quantisation="none")},
        {"data": DataReference(train_sha256="0" * 64, num_train_rows=1)},
        {"settings": {"seed": 1}},
        {"metrics": {"loss": 0.5}},
        {"chat_template_sha256": "0" * 64},
        {"libraries": {"torch": "2"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_differs_when_a_field_differs(change: dict[str, Any]) -> None:
    """Nothing that is recorded can be changed without another name."""
    assert PLAIN_MANIFEST.digest != PLAIN_MANIFEST.model_copy(update=change).digest


@pytest.mark.parametrize("fingerprint", ["f" * 63, "F" * 64, "g" * 64, ""])
def test_base_reference_refuses_when_the_fingerprint_is_not_a_sha256(fingerprint: str) -> None:
    """A fingerprint is 64 lower-case hex digits."""
    with pytest.raises(ValidationError, match="fingerprint"):
        BaseReference(name="tiny", fingerprint=fingerprint, quantisation="none")


def test_manifest_refuses_assignment_when_frozen() -> None:
    """A manifest is never changed in place."""
    with pytest.raises(ValidationError, match="frozen"):
        PLAIN_MANIFEST.rank = 5  # type: ignore[misc]


def test_read_manifest_gives_what_was_written_when_it_is_whole(tmp_path: Path) -> None:
    """The file in the folder is the manifest."""
    (tmp_path / MANIFEST_FILE).write_bytes(PLAIN_MANIFEST.to_bytes())
    assert read_manifest(tmp_path) == PLAIN_MANIFEST


def test_read_manifest_refuses_when_there_is_none(tmp_path: Path) -> None:
    """The missing file is named."""
    with pytest.raises(IntegrityError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        PLAIN_MANIFEST.to_bytes()[:-9],
        PLAIN_MANIFEST.to_bytes().replace(b'"format": 1', b'"format": 2'),
        PLAIN_MANIFEST.to_bytes().replace(b'"rank"', b'"tank"'),
        PLAIN_MANIFEST.to_bytes().replace(
            b'"files": {}', b'"files": {"../x": {"sha256": "%s", "size_bytes": 1}}' % (b"0" * 64)
        ),
        PLAIN_MANIFEST.to_bytes().replace(b'"alpha": 8.0', b'"alpha": NaN'),
    ],
    ids=["empty", "list", "binary", "cut", "format", "unknown key", "path", "alpha"],
)
def test_read_manifest_refuses_when_it_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    """Broken, cut or foreign content is an integrity error that names the file."""
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json is not a manifest"):
        read_manifest(tmp_path)


def test_hash_file_equals_sha256_when_the_file_spans_chunks(tmp_path: Path) -> None:
    """Chunks are joined in order."""
    content = bytes(range(256)) * (math.ceil((1 << 21) / 256) + 1)
    (tmp_path / "file").write_bytes(content)
    assert hashlib.sha256(content).hexdigest() == hash_file(tmp_path / "file")


def test_manifest_keeps_its_digest_when_it_has_no_gate_report(tmp_path: Path) -> None:
    """Versions that were published before the field existed keep their names: these are such a manifest's bytes."""
    old = PLAIN_MANIFEST
    assert "gate" not in json.loads(old.to_bytes())
    assert old.digest == "5d2a4fc021a31a7b9894c2e27940f84e2f6efcbeba236b696cdab4420a76b7d0"
    report = GateReport(checks=[GateCheck(name="base", outcome="passed", sentence="better")])
    judged = old.model_copy(update={"gate": report})
    assert judged.digest != old.digest
    assert parse_manifest(judged.to_bytes(), tmp_path).gate == report


def test_manifest_says_nothing_of_a_validation_share_when_there_was_none() -> None:
    """Versions that were made before there was one keep their names; one that was made with a share has another."""
    data = DataReference(train_sha256="0" * 64, num_train_rows=1)
    old = PLAIN_MANIFEST.model_copy(update={"data": data})
    shared = PLAIN_MANIFEST.model_copy(update={"data": data.model_copy(update={"validation_share": 0.1})})
    assert "validation_share" not in json.loads(old.to_bytes())["data"]
    assert json.loads(shared.to_bytes())["data"]["validation_share"] == 0.1
    assert old.digest != shared.digest


def test_manifest_keeps_its_digest_when_it_says_nothing_of_method_and_kind(tmp_path: Path) -> None:
    """Versions of before these fields keep their names; what is recorded is read back and counts."""
    names = {"kind", "method", "parent"}
    assert not names & set(json.loads(PLAIN_MANIFEST.to_bytes()))
    known = {"kind": "reward", "method": "reward", "parent": "a" * 64}
    later = PLAIN_MANIFEST.model_copy(update=known)
    assert later.digest != PLAIN_MANIFEST.digest
    assert parse_manifest(later.to_bytes(), tmp_path).model_dump(include=names) == known
