"""The learned part of a router: from a text to a calibrated probability for each alias. Knows no database.

A regression over n-grams and, where there are any, token embeddings says how much a text is like the prompts of each
alias; far from all of them it says 0 for each. A gate makes of that how likely the text belongs to any alias at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy import sparse
from scipy.special import expit, softmax

from adapters.errors import IntegrityError
from adapters.routing.embeddings import TokenEmbeddings
from adapters.routing.features import Vectors, Vocabulary, count_grams, normalise
from adapters.routing.templates import strip_templates

__all__ = ["Calibration", "Meaning", "Neighbour", "RouterModel", "Scores", "gate_inputs", "to_matrix"]

_FORMAT = 1
_CONFIG_KEY = "router"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Meaning:
    """From a text's tokens to a vector of length 1: rare tokens count more, and what all texts share is taken away.

    `tokens` ascending with their `weights`, `default` for all others; `mean [size]`; `shared [num, size]` orthonormal.
    `source` is the identity of the embeddings that all of this is about.
    """

    source: str

    tokens: npt.NDArray[np.int64]
    weights: FloatArray
    default: float
    mean: FloatArray
    shared: FloatArray

    def vectorise(self, texts: Sequence[str], embeddings: TokenEmbeddings) -> FloatArray:
        """Vectors of some texts, `[num_texts, size]`."""
        return self.project(np.stack([self.total(embeddings, embeddings.tokens(text)) for text in texts]))

    def total(self, embeddings: TokenEmbeddings, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """The weighted sum of some tokens' embeddings."""
        places = np.minimum(np.searchsorted(self.tokens, tokens), max(0, len(self.tokens) - 1))
        is_known = self.tokens[places] == tokens if len(self.tokens) else np.zeros(len(tokens), dtype=bool)
        weights = np.where(is_known, self.weights[places] if len(self.tokens) else 0.0, self.default)
        return np.asarray(weights.astype(np.float32) @ embeddings.rows(tokens))

    def project(self, totals: FloatArray) -> FloatArray:
        """Totals without what all texts share, scaled to length 1."""
        centred = totals - self.mean
        centred = centred - centred @ self.shared.T @ self.shared
        return np.asarray(centred / (np.linalg.norm(centred, axis=1, keepdims=True) + 1e-9), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Calibration:
    """`sharpness` multiplies what the regression says, before the softmax; the gate is logistic in `gate_inputs`."""

    sharpness: float
    gate_weights: tuple[float, ...]
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

    `coefficients [num_ngrams, num_aliases]`, `intercepts [num_aliases]`; `prompts [num_prompts, num_ngrams]` sparse are
    the aliases' training prompts, with the `classes` and `positions` of its rows. `meaning` and its coefficients
    `meaning_coefficients [size, num_aliases]` are None where there were no embeddings.
    """

    aliases: tuple[str, ...]
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    vocabulary: Vocabulary
    coefficients: FloatArray
    intercepts: FloatArray
    meaning: Meaning | None
    meaning_coefficients: FloatArray | None
    prompts: Any
    classes: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    calibration: Calibration

    def score(self, texts: Sequence[str], embeddings: TokenEmbeddings | None = None) -> list[Scores]:
        """Probabilities for each text; `embeddings` are those that the router was trained with, if it was."""
        cleaned = [self._clean(text) for text in texts]
        values = np.asarray(self._vectorise(cleaned) @ self.coefficients) + self.intercepts
        if self.meaning is not None:
            assert self.meaning_coefficients is not None, "they come together"
            assert embeddings is not None, "whoever loads the router checks"
            values = values + self.meaning.vectorise(cleaned, embeddings) @ self.meaning_coefficients
        calibration = self.calibration
        gates = expit(gate_inputs(values) @ np.array(calibration.gate_weights) + calibration.gate_bias)
        inside = softmax(values * calibration.sharpness, axis=1)
        return [Scores(row.astype(np.float32)) for row in gates[:, None] * inside]

    def nearest(self, text: str, count: int) -> list[Neighbour]:
        """The training prompts that are most similar in words, the nearest first."""
        similarities = (self._vectorise([self._clean(text)]) @ self.prompts.T).toarray()[0]
        order = np.argsort(-similarities, kind="stable")[:count]
        return [
            Neighbour(self.aliases[self.classes[row]], int(self.positions[row]), min(1.0, float(similarities[row])))
            for row in order
        ]

    def _clean(self, text: str) -> str:
        return strip_templates(normalise(text), self.starts, self.ends)

    def _vectorise(self, cleaned: Sequence[str]) -> Any:
        vectors = self.vocabulary.vectorise([count_grams(text) for text in cleaned])
        return to_matrix(vectors, len(self.vocabulary.ids))

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
            "format": _FORMAT,
            "aliases": self.aliases,
            "starts": self.starts,
            "ends": self.ends,
            "calibration": asdict(self.calibration),
        }
        if self.meaning is not None:
            assert self.meaning_coefficients is not None, "they come together"
            config |= {"default_weight": self.meaning.default, "embeddings": self.meaning.source}
            arrays |= {
                "tokens": self.meaning.tokens,
                "token_weights": self.meaning.weights,
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


def to_matrix(vectors: Vectors, num_columns: int) -> Any:
    """The vectors as a sparse matrix of scipy's, `[num_texts, num_columns]`."""
    parts = (vectors.values, vectors.columns, vectors.starts)
    return sparse.csr_matrix(parts, shape=(len(vectors.starts) - 1, num_columns))


def gate_inputs(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What the gate looks at, `[num_texts, 2]`: the highest value of any alias, and the sum over all of them.

    Between two aliases that are alike the highest is low although the text is at home; the sum is not.
    """
    return 10 * np.column_stack([values.max(axis=1), values.sum(axis=1)])


def _read_config(content: bytes) -> dict[str, Any]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    config: dict[str, Any] = json.loads(header["__metadata__"][_CONFIG_KEY])
    if config["format"] != _FORMAT:
        raise ValueError(f"expected format {_FORMAT}, found {config['format']}")
    return config


def _build(config: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> RouterModel:
    vocabulary = Vocabulary(arrays["ids"].view(np.uint64), arrays["weights"])
    parts = (arrays["prompt_values"], arrays["prompt_columns"], arrays["prompt_starts"])
    calibration = config["calibration"]
    meaning = None
    if "tokens" in arrays:
        meaning = Meaning(
            config["embeddings"],
            arrays["tokens"],
            arrays["token_weights"],
            config["default_weight"],
            arrays["mean"],
            arrays["shared"],
        )
    return RouterModel(
        aliases=tuple(config["aliases"]),
        starts=tuple(config["starts"]),
        ends=tuple(config["ends"]),
        vocabulary=vocabulary,
        coefficients=arrays["coefficients"],
        intercepts=arrays["intercepts"],
        meaning=meaning,
        meaning_coefficients=arrays.get("meaning_coefficients"),
        prompts=sparse.csr_matrix(parts, shape=(len(arrays["classes"]), len(vocabulary.ids))),
        classes=arrays["classes"],
        positions=arrays["positions"],
        calibration=Calibration(calibration["sharpness"], tuple(calibration["gate_weights"]), calibration["gate_bias"]),
    )
