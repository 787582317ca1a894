"""Equal and nearly equal texts: found whatever the order, and nothing else with them."""

from __future__ import annotations

import random

import pytest

from training.duplicates import Duplicate, find_duplicates


def _sentences(count: int, *, seed: int = 0, num_words: int = 40) -> list[str]:
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(3, 9))) for _ in range(2000)]
    return [" ".join(generator.choices(words, k=num_words)) for _ in range(count)]


def test_find_duplicates_finds_nothing_when_all_texts_differ() -> None:
    """Chance alone makes no duplicate, not even of texts that share a frame around a few words of their own."""
    texts = _sentences(2000)
    framed = [f"Customer message: {text}\nName the support topic." for text in _sentences(2000, num_words=8)]

    assert [] == find_duplicates(texts)
    assert [] == find_duplicates(framed)


def test_find_duplicates_names_the_first_when_a_text_comes_back() -> None:
    """A third copy is one of the first text, not of the second."""
    a, b = _sentences(2)

    assert [Duplicate(2, 0, True), Duplicate(3, 1, True), Duplicate(4, 0, True)] == find_duplicates([a, b, a, b, a])


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.upper(),
        lambda text: text.replace(" ", ",  ") + "!",
        lambda text: text + " 2024",
        lambda text: " ".join(["another", *text.split()[1:]]),
        lambda text: " ".join(text.split()[:-2]),
    ],
    ids=["case", "punctuation", "digits", "one-word", "shorter"],
)
def test_find_duplicates_finds_a_near_one_when_little_is_changed(change: object) -> None:
    """Among a thousand others, and in either order."""
    assert callable(change)
    texts = _sentences(1000)
    changed = change(texts[7])

    assert [Duplicate(1000, 7, False)] == find_duplicates([*texts, changed])
    assert [Duplicate(8, 0, False)] == find_duplicates([changed, *texts])


def test_find_duplicates_finds_nearly_all_when_little_of_each_is_changed() -> None:
    """Of a hundred texts with one word in forty replaced, most are found; with one in eight, none is."""
    texts = _sentences(100)
    others = _sentences(100, seed=1)

    def mixed(every: int) -> list[str]:
        return [
            " ".join(
                new if n % every == 0 else old for n, (old, new) in enumerate(zip(a.split(), b.split(), strict=True))
            )
            for a, b in zip(texts, others, strict=True)
        ]

    assert len(find_duplicates([*texts, *mixed(40)])) >= 95
    assert [] == find_duplicates([*texts, *mixed(8)])


def test_find_duplicates_looks_for_equal_texts_alone_when_there_are_too_many() -> None:
    """The limit bounds the time; what is equal is found behind it all the same."""
    a, b = _sentences(2)

    assert [Duplicate(3, 1, True)] == find_duplicates([a, b, a.upper(), b], max_near=2)


def test_find_duplicates_takes_short_and_empty_texts_when_they_come() -> None:
    """A text without a letter has no near duplicates; a short one is compared as a whole."""
    assert [Duplicate(3, 0, False)] == find_duplicates(["Yes.", "", "12", "yes!", "no"])
