"""From the probabilities of single turns to a choice for the whole conversation. Stateless: replayed every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.routing.prompts import MAX_CHARS

__all__ = ["Choice", "follow_turns", "take_latest"]

_MAX_TURNS = 32  # the latest of the user's messages; what was said before them has faded
_MAX_READ = 6000  # characters of those together: what reading a conversation anew costs is bounded
_FADES = 0.4  # of what was believed before a turn is replaced by what the turn says
_FULL_CHARS = 40  # a shorter turn says less: "yes, please" moves nothing
_MOVE = 0.7  # a turn that is so sure of another alias has moved the topic
_LEAVE = 0.7  # of the threshold: where belief in the alias falls below that, nobody answers any more

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """The alias by its index, or None; `probabilities` are what is believed of each alias after the last turn."""

    index: int | None
    confidence: float
    probabilities: Probabilities


def take_latest(turns: Sequence[str]) -> list[str]:
    """The latest of the user's messages that are read, in order; blank ones say nothing."""
    taken: list[str] = []
    left = _MAX_READ
    for turn in reversed(turns):
        if turn.strip():
            left -= min(len(turn), MAX_CHARS)
            if left < 0 or len(taken) == _MAX_TURNS:
                break
            taken.append(turn)
    return taken[::-1]


def follow_turns(texts: Sequence[str], turns: Sequence[Probabilities], threshold: float) -> Choice:
    """Choose for a conversation, turn by turn.

    Belief is the mean of the turns, the later ones weighing more, and short ones less. A choice stays while the belief
    in it holds, so that "and what about the second one?" stays where the first question went; it moves only for a turn
    that is by itself sure of another alias, and it is given up when several turns of some length belong nowhere.

    Args:
        texts: The user's messages in order, one or more.
        turns: For each of them the probabilities `[num_aliases]`.
        threshold: The least probability that makes a choice.
    """
    belief = turns[0]
    current = _best(belief, threshold)
    for text, turn in zip(texts[1:], turns[1:], strict=True):
        moved = _best(turn, max(threshold, _MOVE))
        weight = _FADES * min(1.0, len(text) / _FULL_CHARS)
        belief = turn if moved is not None else (1 - weight) * belief + weight * turn
        if moved is not None:
            current = moved
        elif current is None:
            current = _best(belief, threshold)
        elif belief[current] < _LEAVE * threshold:
            current = None
    confidence = float(belief.max(initial=0.0) if current is None else belief[current])
    return Choice(current, confidence, belief)


def _best(probabilities: Probabilities, least: float) -> int | None:
    if not len(probabilities) or probabilities.max() < least:
        return None
    return int(probabilities.argmax())
