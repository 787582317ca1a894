"""The grammar of names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.errors import InvalidNameError
from adapters.records import AdapterVersion, Binding, ModelName, NumberedVersion, check_alias_name, parse_model_name
from adapters.tables import utc_now

DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["legal", "0", "a.b_c-d", "a" * 63, "base2", "automatic", "v1"])
def test_check_alias_name_returns_the_name_when_it_fits_the_grammar(name: str) -> None:
    """Letters, digits and three signs, up to 63 of them, are an alias."""
    assert name == check_alias_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "a" * 64, "Legal", "-legal", ".legal", "_legal", "le gal", "legal\n", "légal", "../legal", "a/b", "٣", "a@v1"],
)
def test_check_alias_name_refuses_when_the_name_breaks_the_grammar(name: str) -> None:
    """The message holds the name and the field is named."""
    with pytest.raises(InvalidNameError, match="is not an alias: expected 1 to 63") as caught:
        check_alias_name(name)
    assert repr(name) in str(caught.value)
    assert caught.value.param == "alias"


@pytest.mark.parametrize("name", ["base", "auto"])
def test_check_alias_name_refuses_when_the_name_is_reserved(name: str) -> None:
    """What means the base model or the router can't be published under."""
    with pytest.raises(InvalidNameError, match=f"'{name}' is reserved"):
        check_alias_name(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("legal", ModelName("legal")),
        ("legal@v1", ModelName("legal", number=1)),
        ("legal@v999999999", ModelName("legal", number=999_999_999)),
        ("legal@0123abcd", ModelName("legal", digest_prefix="0123abcd")),
        (f"legal@{DIGEST}", ModelName("legal", digest_prefix=DIGEST)),
    ],
)
def test_parse_model_name_splits_when_the_name_is_valid(name: str, expected: ModelName) -> None:
    """Alias alone, with a number or with a digest."""
    assert expected == parse_model_name(name)


@pytest.mark.parametrize(
    "version",
    [
        "",
        "v",
        "v0",
        "v01",
        "v-1",
        "v1 ",
        "v1\n",
        "1",
        "V1",
        "v1@v2",
        "v1000000000",
        "0123abc",
        "0123ABCD",
        f"{DIGEST}0",
    ],
)
def test_parse_model_name_refuses_when_the_version_breaks_the_grammar(version: str) -> None:
    """What follows the @ is named in the message."""
    with pytest.raises(InvalidNameError, match="is not a version of 'legal'") as caught:
        parse_model_name(f"legal@{version}")
    assert repr(version) in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.from_regex(r"[a-z0-9._-]{0,5}@?v?[0-9a-f]{0,12}", fullmatch=True))
def test_parse_model_name_gives_back_the_same_text_or_refuses_when_given_any_text(name: str) -> None:
    """No text crashes the parser, and what it accepts it has understood whole."""
    try:
        parsed = parse_model_name(name)
    except InvalidNameError:
        return
    version = f"v{parsed.number}" if parsed.number is not None else parsed.digest_prefix
    assert name == (parsed.alias if version is None else f"{parsed.alias}@{version}")


def test_labels_name_alias_and_number_when_there_is_a_version() -> None:
    """A binding and a numbered version show the same name."""
    version = NumberedVersion("legal", 2, AdapterVersion(DIGEST, "f" * 64, 4, 10, "imported", utc_now()))
    assert version.label == "legal@v2"
    assert Binding("legal", "alias", DIGEST, 2).version_label == "legal@v2"
    assert Binding("base", "base").version_label == "base"
