"""The learned part of a router: from a text to a calibrated probability for each alias. Knows no database.

A regression over n-grams and, where there are any, token embeddings says how much a text is like the prompts of each
alias; far from all of them it says 0 for each. A gate makes of that how likely the text belongs to any alias at all.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy import sparse

from adapters.errors import IntegrityError
from adapters.routing import ROUTER_FORMAT
from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.features import Vectors, Vocabulary, count_grams, hash_words, normalise
from adapters.routing.spelling import Speller, correct_spelling
from adapters.routing.templates import strip_templates

__all__ = ["Calibration", "Meaning", "Neighbour", "RouterModel", "Scores", "gate_input"]

_CONFIG_KEY = "router"
_SHARED_TAKEN = 0.85
_SUM_SHARE = 0.5  # of the sum over all aliases, beside the highest value, in what the gate looks at

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Meaning:
    """From a text's words to a vector of length 1: rare words count more, what all texts share counts less.

    `words` are hashes, ascending, with their `weights`, `default` for all others; `mean [size]`; `shared [num, size]`
    orthonormal. `source` is the identity of the embeddings that all of this is about.
    """

    source: str

    words: npt.NDArray[np.int64]
    weights: FloatArray
    default: float
    mean: FloatArray
    shared: FloatArray

    def vectorise(self, texts: Sequence[str], embeddings: TokenEmbeddings) -> FloatArray:
        """Vectors of some cleaned texts, `[num_texts, size]`."""
        return self.project(self.totals(texts, embeddings))

    def totals(self, texts: Sequence[str], embeddings: TokenEmbeddings) -> FloatArray:
        """The weighted sums of the embeddings of each text's words, `[num_texts, size]`."""
        split = [text.split() for text in texts]
        words = [word for own in split for word in own]
        place = {word: number for number, word in enumerate(dict.fromkeys(words))}
        rows = embeddings.rows(list(place)) * self._weights_of(list(place))[:, None]
        owners = np.repeat(np.arange(len(split)), [*map(len, split)])
        places = np.array([place[word] for word in words], dtype=np.int64)
        counts = np.bincount(owners * len(place) + places, minlength=len(split) * len(place))
        return counts.reshape(len(split), len(place)).astype(np.float32) @ rows

    def project(self, totals: FloatArray) -> FloatArray:
        """Totals without their mean and most of what all texts share, scaled to length 1.

        All of it (Mu and Viswanath, arXiv 1702.01417, algorithm 1) costs accuracy; without, texts of nobody look like
        somebody's.
        """
        centred = totals - self.mean
        centred = centred - _SHARED_TAKEN * (centred @ self.shared.T) @ self.shared
        return np.asarray(centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9), dtype=np.float32)

    def _weights_of(self, words: Sequence[str]) -> FloatArray:
        hashes = hash_words(words)
        if not len(self.words):
            return np.full(len(hashes), self.default, dtype=np.float32)
        places = np.minimum(np.searchsorted(self.words, hashes), len(self.words) - 1)
        return np.where(self.words[places] == hashes, self.weights[places], np.float32(self.default))


@dataclass(frozen=True, slots=True)
class Calibration:
    """`sharpness` multiplies what the regression says, before the softmax; the gate is logistic in `gate_input`."""

    sharpness: float
    gate_weight: float
    gate_bias: float


@dataclass(frozen=True, slots=True)
class Scores:
    """One text: `probabilities [num_aliases]` of belonging to each alias; what they lack of 1 is that of none."""

    probabilities: FloatArray

    @property
    def none(self) -> float:
        """The probability that it belongs to no alias."""
        return float(max(0.0, 1.0 - self.probabilities.sum()))


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A training prompt near a text: the `position`-th of those that are kept of an alias's version."""

    alias: str
    position: int
    similarity: float


@dataclass(frozen=True, slots=True)
class RouterModel:
    """A trained router.

    `groups` are the aliases by what they are asked: those of one group were trained from much the same prompts, so that
    no text can tell them apart. The first of each is that whose prompts the router knows, and stands in `aliases`.
    `speller` knows the words of the training prompts. `coefficients [num_ngrams, num_aliases]` and `intercepts
    [num_aliases]` are the regression's; `prompts [num_prompts, num_ngrams]` sparse are the aliases' training prompts,
    with the `classes` and `positions` of its rows. `meaning` and its coefficients `meaning_coefficients [size,
    num_aliases]` are None where there were no embeddings.
    """

    groups: tuple[tuple[str, ...], ...]
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    speller: Speller
    vocabulary: Vocabulary
    coefficients: FloatArray
    intercepts: FloatArray
    meaning: Meaning | None
    meaning_coefficients: FloatArray | None
    prompts: Any
    classes: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    calibration: Calibration

    @property
    def aliases(self) -> tuple[str, ...]:
        """The first alias of each group, in the order of the probabilities."""
        return tuple(group[0] for group in self.groups)

    def score(self, texts: Sequence[str], embeddings: TokenEmbeddings | None = None) -> list[Scores]:
        """Probabilities for each text; `embeddings` are those that the router was trained with, if it was."""
        cleaned = [self._clean(text, embeddings) for text in texts]
        values = self._vectorise(cleaned).times(self.coefficients) + self.intercepts
        if self.meaning is not None:
            assert self.meaning_coefficients is not None, "they come together"
            assert embeddings is not None, "whoever loads the router checks"
            values = values + self.meaning.vectorise(cleaned, embeddings) @ self.meaning_coefficients
        calibration = self.calibration
        gates = 1 / (1 + np.exp(-(calibration.gate_weight * gate_input(values) + calibration.gate_bias)))
        raised = np.exp(calibration.sharpness * (values - values.max(axis=1, keepdims=True)))
        inside = raised / raised.sum(axis=1, keepdims=True)
        return [Scores(row.astype(np.float32)) for row in gates[:, None] * inside]

    def nearest(self, text: str, count: int, *, among: Container[str] | None = None) -> list[Neighbour]:
        """The training prompts that are most similar in words, the nearest first; fewer if few share any.

        Args:
            text: What a user says.
            count: How many at most.
            among: Of which aliases; None is all.
        """
        aliases = self.aliases
        is_wanted = np.array([among is None or alias in among for alias in aliases])
        vector = self._vectorise([self._clean(text)]).to_matrix(len(self.vocabulary.ids))
        similarities = (vector @ self.prompts.T).toarray()[0] * is_wanted[self.classes]
        order = np.argsort(-similarities, kind="stable")[:count]
        return [
            Neighbour(aliases[self.classes[row]], int(self.positions[row]), min(1.0, float(similarities[row])))
            for row in order
            if similarities[row] > 0
        ]

    def _clean(self, text: str, embeddings: TokenEmbeddings | None = None) -> str:
        spellers = [self.speller] if embeddings is None else [self.speller, embeddings.speller]
        return strip_templates(correct_spelling(normalise(text), spellers), self.starts, self.ends)

    def _vectorise(self, cleaned: Sequence[str]) -> Vectors:
        return self.vocabulary.vectorise(count_grams(cleaned))

    def to_bytes(self) -> bytes:
        """The model as safetensors; the small parts as JSON in its metadata."""
        arrays = {
            "ids": self.vocabulary.ids.view(np.int64),
            "weights": self.vocabulary.weights,
            "coefficients": self.coefficients,
            "intercepts": self.intercepts,
            "prompt_values": self.prompts.data,
            "prompt_columns": self.prompts.indices.astype(np.int32),
            "prompt_starts": self.prompts.indptr.astype(np.int64),
            "classes": self.classes,
            "positions": self.positions,
        }
        config: dict[str, Any] = {
            "format": ROUTER_FORMAT,
            "groups": self.groups,
            "starts": self.starts,
            "ends": self.ends,
            "words": self.speller.words,
            "calibration": asdict(self.calibration),
        }
        if self.meaning is not None:
            assert self.meaning_coefficients is not None, "they come together"
            config |= {"default_weight": self.meaning.default, "embeddings": self.meaning.source}
            arrays |= {
                "words": self.meaning.words,
                "word_weights": self.meaning.weights,
                "mean": self.meaning.mean,
                "shared": self.meaning.shared,
                "meaning_coefficients": self.meaning_coefficients,
            }
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        return bytes(save(whole, metadata={_CONFIG_KEY: json.dumps(config)}))

    @classmethod
    def from_bytes(cls, content: bytes) -> RouterModel:
        """The model that `to_bytes` wrote.

        Raises:
            IntegrityError: it is not one of this format.
        """
        try:
            return _build(_read_config(content), load(content))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"the stored router can't be read: {error}") from None


def gate_input(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the gate looks at, `[num_texts]`: the highest value of any alias, and a little of the sum over all of them.

    Between two aliases that are alike the highest is low although the text is at home; the sum is not. The share of the
    sum is fixed: strangers are played by aliases that were left out, whose sums lack a summand, and a gate that could
    weigh the sum took that for the mark of a stranger, the more the fewer aliases there were (docs/decisions/0028).
    """
    return np.asarray(10 * (values.max(axis=1) + _SUM_SHARE * values.sum(axis=1)))


def _read_config(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config: dict[str, Any] = json.loads(header["__metadata__"][_CONFIG_KEY])
    if config["format"] != ROUTER_FORMAT:
        raise ValueError(f"expected format {ROUTER_FORMAT}, found {config['format']}")
    return config


def _build(config: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> RouterModel:
    vocabulary = Vocabulary(arrays["ids"].view(np.uint64), arrays["weights"])
    parts = (arrays["prompt_values"], arrays["prompt_columns"], arrays["prompt_starts"])
    meaning = None
    if "words" in arrays:
        meaning = Meaning(
            config["embeddings"],
            arrays["words"],
            arrays["word_weights"],
            config["default_weight"],
            arrays["mean"],
            arrays["shared"],
        )
    return RouterModel(
        groups=tuple(map(tuple, config["groups"])),
        starts=tuple(config["starts"]),
        ends=tuple(config["ends"]),
        speller=Speller(config["words"]),
        vocabulary=vocabulary,
        coefficients=arrays["coefficients"],
        intercepts=arrays["intercepts"],
        meaning=meaning,
        meaning_coefficients=arrays.get("meaning_coefficients"),
        prompts=sparse.csr_matrix(parts, shape=(len(arrays["classes"]), len(vocabulary.ids))),
        classes=arrays["classes"],
        positions=arrays["positions"],
        calibration=Calibration(**config["calibration"]),
    )
