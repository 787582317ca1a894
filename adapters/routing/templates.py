"""Finds the form that prompts of one alias share, and takes it away: a router must tell topics apart, not templates.

Data for one adapter is often made with one template ("Which kind of clause is this? ..."), while people write freely.
A beginning or an end that many prompts share word for word is such a template, whatever it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

__all__ = ["find_templates", "strip_templates"]

_MIN_WORDS = 3
_MAX_WORDS = 40
_MIN_SHARE = 0.08
_MIN_PROMPTS = 8
_LEAST_LEFT = 2  # words: a prompt that is all template keeps what it is made of


def find_templates(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Beginnings and ends that many of one alias's normalised prompts share, the longest first."""
    prompts = [text.split(" ") for text in texts]
    reversed_prompts = [words[::-1] for words in prompts]
    starts = _shared_beginnings(prompts)
    ends = [words[::-1] for words in _shared_beginnings(reversed_prompts)]
    return tuple(" ".join(words) for words in starts), tuple(" ".join(words) for words in ends)


def strip_templates(text: str, starts: Sequence[str], ends: Sequence[str]) -> str:
    """The normalised text without the longest of these beginnings and ends that it has."""
    stripped = text
    for start in starts:
        if stripped.startswith(start + " "):
            stripped = stripped[len(start) + 1 :]
            break
    for end in ends:
        if stripped.endswith(" " + end):
            stripped = stripped[: -len(end) - 1]
            break
    return stripped if stripped.count(" ") + 1 >= _LEAST_LEFT else text


def _shared_beginnings(prompts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Beginnings of at least three words that enough prompts share.

    From each, as far as most of its prompts agree; where some leave on the way, the beginning up to there is another.
    """
    counts = Counter(
        tuple(words[:size]) for words in prompts for size in range(_MIN_WORDS, min(len(words), _MAX_WORDS) + 1)
    )
    longer: dict[tuple[str, ...], tuple[str, ...]] = {}
    for words, count in counts.items():
        parent = words[:-1]
        if len(words) > _MIN_WORDS and (parent not in longer or count > counts[longer[parent]]):
            longer[parent] = words
    least = max(_MIN_PROMPTS, _MIN_SHARE * len(prompts))
    found = []
    for start, count in counts.items():
        if len(start) > _MIN_WORDS or count < least:
            continue
        words = start
        while words in longer and counts[longer[words]] > counts[words] / 2:
            if counts[longer[words]] < counts[words]:
                found.append(words)
            words = longer[words]
        found.append(words)
    return [list(words) for words in sorted(found, key=lambda words: (-len(words), words))]
