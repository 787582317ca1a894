"""From the probabilities of single turns to a choice for the whole conversation. Stateless: replayed every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_TURNS", "Choice", "follow_turns"]

MAX_TURNS = 6  # the latest of the user's messages; what was said before them has faded
_KEPT = 0.6  # of what was believed before a turn
_MOVE = 0.7  # a turn that is so sure of another alias has moved the topic
_LEAVE = 0.7  # of the threshold: where belief in the alias falls below that, nobody answers any more

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Choice:
    """The alias by its index, or None; `probabilities` are what is believed of each alias after the last turn."""

    index: int | None
    confidence: float
    probabilities: Probabilities


def follow_turns(turns: Sequence[Probabilities], threshold: float) -> Choice:
    """Choose for a conversation, turn by turn.

    Belief is the mean of the turns, the later ones weighing more. A choice stays while the belief in it holds, so that
    "and what about the second one?" stays where the first question went; it moves only for a turn that is by itself
    sure of another alias, and it is given up when several turns in a row belong nowhere.

    Args:
        turns: For each of the user's messages in order, one or more, the probabilities `[num_aliases]`.
        threshold: The least probability that makes a choice.
    """
    belief = turns[0]
    current = _best(belief, threshold)
    for turn in turns[1:]:
        moved = _best(turn, max(threshold, _MOVE))
        belief = turn if moved is not None else _KEPT * belief + (1 - _KEPT) * turn
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
