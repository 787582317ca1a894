"""N-grams: what counts as the same text, hashes that every process agrees on, and vectors of length 1."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.routing.features import MAX_CHARS, Vocabulary, count_grams, learn_vocabulary, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My  LANDLORD\n won\u2019t pay", "my landlord won't pay"),
        ("Pay 1,200.50 by 3:15?", "pay 0 by 0 ?"),
        ("see https://example.org/a?b=1 now", "see url now"),
        ("\uff26\uff35\uff2c\uff2c width", "full width"),
        ("", ""),
        ("\ud800 lone", "lone"),
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
    assert len(text) <= MAX_CHARS + 1


def test_hashes_are_the_published_ones_when_counted() -> None:
    """A stored router is of no use to a process that hashes otherwise."""
    grams = count_grams("a lease")
    assert [4111128860894846473, 11402559814749897447, 17689168582046769688] == grams.words[0].tolist()
    assert [1.0, 1.0, 1.0] == grams.words[1].tolist()
    assert (13, 13) == (len(grams.chars[0]), int(grams.chars[1].sum()))


def test_character_windows_stay_within_words_when_counted() -> None:
    """Two words side by side share no window, so their order changes none."""
    assert count_grams("one two").chars[0].tolist() == count_grams("two one").chars[0].tolist()
    assert count_grams("one two").words[0].tolist() != count_grams("two one").words[0].tolist()


def test_vocabulary_leaves_out_what_one_text_alone_has_when_learned() -> None:
    """And weighs what few texts have above what all have."""
    texts = [count_grams(text) for text in ("the lease", "the lease", "the oven")]
    vocabulary = learn_vocabulary(texts)
    the, lease, oven = (int(count_grams(word).words[0][0]) for word in ("the", "lease", "oven"))
    weights = dict(zip(vocabulary.ids.tolist(), vocabulary.weights.tolist(), strict=True))
    assert oven not in weights
    assert weights[the] == pytest.approx(1.0)
    assert weights[lease] == pytest.approx(1 + np.log(4 / 3), rel=1e-6)


def test_vectors_have_length_one_when_something_is_known() -> None:
    """Whatever the text's length; a text of which nothing is known is all zeros, also without a vocabulary."""
    texts = [count_grams(text) for text in ("the lease the lease", "the oven", "zzz")]
    vectors = learn_vocabulary(texts[:2] * 2).vectorise(texts)
    lengths = [
        float(np.linalg.norm(vectors.values[start:end]))
        for start, end in zip(vectors.starts[:-1], vectors.starts[1:], strict=True)
    ]
    assert [pytest.approx(1.0), pytest.approx(1.0), 0.0] == lengths
    empty = Vocabulary(np.empty(0, np.uint64), np.empty(0, np.float32))
    assert [0, 0] == empty.vectorise(texts[:1]).starts.tolist()
