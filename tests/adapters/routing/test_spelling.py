"""Spelling: the word that one slip leads back to, the likelier first; what is known or too far stays."""

from __future__ import annotations

import pytest

from adapters.routing.spelling import Speller, correct_spelling


@pytest.fixture(scope="module")
def speller() -> Speller:
    """Knows a few words."""
    return Speller(["deposit", "tenant", "house", "horse", "miete", "ключи", "a", "x2yz"])


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("depsoit", "deposit"),  # swapped
        ("deposi", "deposit"),  # left out
        ("depposit", "deposit"),  # doubled
        ("deposut", "deposit"),  # another
        ("edposit", "deposit"),
        ("xdeposit", "deposit"),
        ("hoise", "house"),
        ("hose", "house"),  # also one slip from horse, which is the less likely
        ("клюич", "ключи"),
        ("dpeosit", "deposit"),
        ("dpsoeit", None),  # two slips
        ("depost x", None),
        ("x2y", None),
        ("b", None),
        ("", None),
    ],
)
def test_word_is_found_when_one_letter_is_wrong(word: str, expected: str | None, speller: Speller) -> None:
    """In any script."""
    assert expected == speller.correct(word)


def test_known_words_stay_when_a_text_is_corrected(speller: Speller) -> None:
    """Whoever knows them; the first speller that finds what was meant is asked."""
    other = Speller(["hose", "tenants"])
    assert "the hose of a tenant ?" == correct_spelling("the hose of a tenannt ?", [speller, other])
    assert "" == correct_spelling("", [speller])


def test_correcting_comes_to_an_end_when_a_text_is_nonsense(speller: Speller) -> None:
    """Only so many words are looked at: what a text may cost is bounded."""
    found = correct_spelling(" ".join(["tenannt"] * 40), [speller]).split()
    assert ["tenant"] * 12 == found[:12]
    assert {"tenannt"} == set(found[12:])


def test_nothing_is_found_when_no_words_are_known() -> None:
    """An empty speller knows nothing and finds nothing."""
    assert Speller([]).correct("deposit") is None
