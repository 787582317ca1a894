"""What an evaluation says, on predictions whose figures can be worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from adapters.routing.evaluation import add_typos, evaluate

ALIASES = ("a", "b")
PROBABILITIES = {"right": [0.9, 0.0], "wrong": [0.2, 0.7], "weak": [0.4, 0.3], "out": [0.1, 0.1], "taken": [0.6, 0.1]}


def _predict(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    return np.array([PROBABILITIES.get(text.lower(), [0.0, 0.0]) for text in texts], dtype=np.float32)


def test_figures_are_those_worked_out_when_evaluated() -> None:
    """Three texts of alias a, of which one is taken for b and one is too weak; two of none, of which one is routed."""
    texts = list(PROBABILITIES)
    expected = ["a", "a", "a", None, None]
    found = evaluate(_predict, ALIASES, texts, expected, ["weak", None, None, None, "out"], threshold=0.5)
    confidence, inside = [0.9, 0.7, 0.4, 0.1, 0.6], [1, 1, 1, 0, 0]
    assert (5, 2) == (found.num_texts, found.num_outside)
    assert pytest.approx(2 / 3) == found.accuracy
    assert pytest.approx(f1_score([0, 0, 0], [0, 1, 0], labels=[0], average="macro")) == found.macro_f1
    assert pytest.approx(roc_auc_score(inside, confidence)) == found.auc
    assert pytest.approx((0.1 + 0.7 + 0.6 + 0.1 + 0.6) / 5) == found.calibration_error
    assert [pytest.approx(2 / 3), pytest.approx(1 / 3)] == [found.routed, found.misrouted]
    assert 0.5 == found.taken_in
    shares = {
        point.threshold: (round(point.routed, 3), round(point.misrouted, 3), point.taken_in)
        for point in found.thresholds
    }
    assert (1.0, 0.333, 0.5) == shares[0.3]
    assert (0.667, 0.333, 0.5) == shares[0.5]
    assert (0.333, 0.0, 0.0) == shares[0.8]
    assert 1.0 == found.flips_by_paraphrase
    assert 0.0 == found.flips_by_case
    assert [pytest.approx(3 / 5), pytest.approx(1 / 2)] == [
        point.risk for point in found.risk_coverage if point.coverage in (1.0, 0.5)
    ]


def test_nothing_is_said_of_what_was_not_given_when_evaluated() -> None:
    """No texts of no alias, no paraphrases; and no known alias is an error."""
    found = evaluate(_predict, ALIASES, ["right"], ["a"], [None], threshold=0.5)
    assert (None, None, None) == (found.auc, found.taken_in, found.flips_by_paraphrase)
    with pytest.raises(ValueError, match="no text with an alias"):
        evaluate(_predict, ALIASES, ["right"], ["c"], [None], threshold=0.5)


def test_typos_are_slips_when_added() -> None:
    """One in a short text, more in a long one, the same every time; where there are no words there are none."""
    text = "the landlord keeps my deposit"
    assert text != add_typos(text)
    assert add_typos(text) == add_typos(text)
    assert abs(len(add_typos(text)) - len(text)) <= 1
    assert "1 2 3" == add_typos("1 2 3")
