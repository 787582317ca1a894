"""From an experiment's numbers to its verdict: pure rules, which docs/verdicts.md says in words.

Missing data is never success: what can't be shown is not passed, and what is not passed is not promoted. How a verdict
is told is in `verdict_words`.
"""

from __future__ import annotations

from dataclasses import replace

from adapters import verdict_words as words
from adapters.evidence import Evidence, Verdict

__all__ = ["judge"]


def judge(evidence: Evidence) -> Verdict:
    """The verdict, by the first rule that applies; with what limits it, whichever it is.

    1. A guardrail is breached: roll back, also where the split is wrong. Harm is not waited out.
    2. The users are not split as they should be: inconclusive, whatever else the numbers say.
    3. The sample was planned, and is not there yet, or feedback on it may still come: continue.
    4. A treatment is better, and nothing holds it back: promote. Of several the one with the highest estimate.
    5. Every treatment is worse: roll back.
    6. Every treatment is worse or equivalent, or nothing more is to come: inconclusive.
    7. Otherwise: continue.
    """
    verdict = _judge(evidence)
    return replace(verdict, notes=(*verdict.notes, *words.limits_of(evidence)))


def _judge(evidence: Evidence) -> Verdict:
    for treatment in evidence.treatments:
        if breached := [guard for guard in treatment.guards if guard.state == "breached"]:
            return words.breach(evidence, treatment, breached)
    if evidence.split.fired:
        return words.mismatch(evidence)
    if evidence.is_early:
        return words.early(evidence)
    better = [treatment for treatment in evidence.treatments if treatment.outcome == "better"]
    if free := [treatment for treatment in better if not words.obstacles_of(evidence, treatment)]:
        return words.promotion(evidence, max(free, key=words.estimate_of))
    outcomes = {treatment.outcome for treatment in evidence.treatments}
    if outcomes == {"worse"}:
        return words.loss(evidence)
    if outcomes <= {"worse", "equivalent"}:
        return words.equivalence(evidence)
    if better:
        return words.held_back(evidence, max(better, key=words.estimate_of))
    return words.unsettled(evidence)
