"""N-grams: what counts as the same text, hashes that every process agrees on, and vectors of length 1."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from adapters.routing.features import Vectors, Vocabulary, count_grams, learn_vocabulary, normalise
from adapters.routing.prompts import MAX_CHARS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My  LANDLORD\n won\u2019t pay", "my landlord won't pay"),
        ("Pay 1,200.50 by 3:15?", "pay 0 by 0 ?"),
        ("see https://example.org/a?b=1 now", "see url now"),
        ("\uff26\uff35\uff2c\uff2c width", "full width"),
        ("", ""),
        ("\ud800 lone", "lone"),
        ("snake_case", "snake case"),
        ("हिन्दी में पूछो", "हिन्दी में पूछो"),
        ("租房押金能退吗?", "租房押金能退吗 ?"),
    ],
)
def test_normalise_forgets_what_is_no_topic_when_given(text: str, expected: str) -> None:
    """Case, space, quotes, which number, which address; half a surrogate pair is no letter."""
    assert expected == normalise(text)


def test_normalise_keeps_both_ends_when_a_text_is_long() -> None:
    """What a choice may cost is bounded, and a question may stand at either end."""
    text = normalise("alpha " + "x " * MAX_CHARS + "omega")
    assert text.startswith("alpha x")
    assert text.endswith("x omega")
    assert len(text) <= MAX_CHARS


def _chars(text: str) -> list[int]:
    return sorted(count_grams([text]).chars[0].tolist())


def test_hashes_are_the_published_ones_when_counted() -> None:
    """A stored router is of no use to a process that hashes otherwise."""
    grams = count_grams(["a lease"])
    assert [4111128860894846473, 11402559814749897447, 17689168582046769688] == sorted(grams.words[0].tolist())
    assert 13 == len(grams.chars[0])


def test_character_windows_stay_within_words_when_counted() -> None:
    """Two words side by side share no window, so their order changes none."""
    assert _chars("one two") == _chars("two one")
    first, second = (sorted(count_grams([text]).words[0].tolist()) for text in ("one two", "two one"))
    assert first != second


def test_grams_are_those_of_each_text_when_several_are_counted_at_once() -> None:
    """Nothing reaches over from one text into the next, empty ones included."""
    texts = ["the lease", "", "a oven", "lease"]
    together = count_grams(texts)
    for number, text in enumerate(texts):
        alone = count_grams([text])
        for kind in ("words", "chars"):
            (hashes, owners), (expected, _) = getattr(together, kind), getattr(alone, kind)
            assert sorted(expected.tolist()) == sorted(hashes[owners == number].tolist())


def test_vocabulary_leaves_out_what_one_text_alone_has_when_learned() -> None:
    """And weighs what few texts have above what all have; twice in one text is once."""
    vocabulary = learn_vocabulary(count_grams(["the lease", "the lease", "the oven oven"]))
    the, lease, oven = (int(count_grams([word]).words[0][0]) for word in ("the", "lease", "oven"))
    weights = dict(zip(vocabulary.ids.tolist(), vocabulary.weights.tolist(), strict=True))
    assert oven not in weights
    assert weights[the] == pytest.approx(1.0)
    assert weights[lease] == pytest.approx(1 + np.log(4 / 3), rel=1e-6)


def _lengths(vectors: Vectors) -> list[float]:
    return [
        float(np.linalg.norm(vectors.values[start:end])) for start, end in itertools.pairwise(vectors.starts.tolist())
    ]


def test_vectors_have_length_one_when_something_is_known() -> None:
    """Whatever the text's length; a text of which nothing is known is all zeros, also without a vocabulary."""
    texts = ["the lease the lease", "the oven", "zzz", ""]
    vectors = learn_vocabulary(count_grams(texts[:2] * 2)).vectorise(count_grams(texts))
    assert [pytest.approx(1.0), pytest.approx(1.0), 0.0, 0.0] == _lengths(vectors)
    empty = Vocabulary(np.empty(0, np.uint64), np.empty(0, np.float32))
    assert [0, 0] == empty.vectorise(count_grams(texts[:1])).starts.tolist()


def test_products_are_scipys_when_vectors_are_multiplied() -> None:
    """Term by term: (1 + log count) times the weight, scaled; the quick way and the matrix agree."""
    texts = ["the lease the lease", "the oven", ""]
    vocabulary = learn_vocabulary(count_grams(texts * 2))
    vectors = vocabulary.vectorise(count_grams(texts))
    matrix = vectors.to_matrix(len(vocabulary.ids))
    table = np.arange(2.0 * len(vocabulary.ids)).reshape(-1, 2)
    assert np.allclose(matrix @ table, vectors.times(table))
    words = count_grams(["the", "lease"]).words[0]
    places = np.searchsorted(vocabulary.ids, words)
    found = matrix.toarray()[0, places]
    assert found[0] / found[1] == pytest.approx(float(vocabulary.weights[places[0]] / vocabulary.weights[places[1]]))
