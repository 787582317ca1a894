"""What the gate found about a version: the record of it in the manifest, and what follows for the alias."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

__all__ = ["FORGETTING_CURE", "CheckName", "GateCheck", "GateReport", "Outcome", "Verdict", "may_promote"]

CheckName = Literal["base", "present", "forgetting", "format", "sampling"]
Outcome = Literal["passed", "failed", "unchecked"]
Verdict = Literal["passed", "failed", "inconclusive"]

# Without these nothing is known about the version; the others may be switched off.
_NEEDED: tuple[CheckName, ...] = ("base", "present")

FORGETTING_CURE = "lower learning_rate, train for fewer epochs, or mix everyday conversations into the rows"
_CURES: dict[CheckName, str] = {
    "base": "train on more rows, or for more epochs; fewer where the validation loss rose while the training loss fell",
    "present": "train on more rows, go on from that version (--start-from), or train for more steps",
    "forgetting": FORGETTING_CURE,
    "format": "train for more epochs or on more rows, if the rows themselves keep to the format",
    "sampling": "train for more steps or on more rows, and read samples.jsonl of the run",
}
# By what the comparison with the version that answers now found.
_SEEMS_BETTER = (
    "it may be better, which so few validation rows can't show: give more of them (--validation-share 0.2), or train "
    "on more rows"
)
_MADE_WORSE = (
    "training made it worse than what answers now: a lower learning_rate, fewer epochs, or more rows; after only a few "
    "steps, more of them"
)
# By what most of the degenerate answers are, as `GateCheck.figures` of `sampling` counts them.
_FLAW_CURES = {
    "too_long": "train for more steps or on more rows: the end of a turn is not learned yet",
    "loop": "train on more rows, with a lower learning_rate or for fewer epochs: the answers repeat themselves",
    "empty": "look for rows with empty or very short answers, and train with a lower learning_rate",
}
_VALIDATE = "give 8 validation rows or more: a validation file, or validation_share"


class GateCheck(BaseModel):
    """One check: what was compared, in a sentence, and the numbers in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: CheckName
    outcome: Outcome
    sentence: Annotated[str, StringConstraints(max_length=1000)]
    figures: dict[str, float] = Field(default_factory=dict, max_length=20)

    @property
    def cure(self) -> str | None:
        """What usually mends it; None if nothing is to be mended.

        Not recorded: reports of earlier releases have it, too.
        """
        if self.outcome == "unchecked" and self.name == "base":
            return _VALIDATE
        if self.outcome != "failed":
            return None
        if self.name == "format" and not self.figures:
            return "have answers sampled: gate_samples above 0"
        if self.name in ("base", "present") and "improvement" in self.figures:
            return self._comparison_cure(self.figures["improvement"])
        flaws = [flaw for flaw in _FLAW_CURES if flaw in self.figures] if self.name == "sampling" else []
        return _FLAW_CURES[max(flaws, key=self.figures.__getitem__)] if flaws else _CURES[self.name]

    def _comparison_cure(self, improvement: float) -> str:
        if improvement > 0:
            return _SEEMS_BETTER
        return _MADE_WORSE if self.name == "present" else _CURES[self.name]


class GateReport(BaseModel):
    """All checks of one version, whatever they say. `compared_with` is the digest that the alias pointed to, if any."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    checks: list[GateCheck] = Field(max_length=20)
    compared_with: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def verdict(self) -> Verdict:
        """Failed if any check failed; inconclusive if one that is needed could not be made; passed otherwise."""
        if any(check.outcome == "failed" for check in self.checks):
            return "failed"
        if any(check.outcome == "unchecked" and check.name in _NEEDED for check in self.checks):
            return "inconclusive"
        return "passed"

    @property
    def reason(self) -> str:
        """The verdict in a sentence: what failed, or what could not be checked."""
        if self.verdict == "passed":
            return "the gate was passed"
        outcome = "failed" if self.verdict == "failed" else "unchecked"
        sentences = [check.sentence for check in self.checks if check.outcome == outcome]
        title = "the gate was not passed" if self.verdict == "failed" else "the gate is inconclusive"
        return f"{title}: {'; '.join(sentences)}"


def may_promote(promote: Literal["always", "gate", "never"], report: GateReport | None) -> bool:
    """Whether an alias may move to a version with this report.

    An inconclusive version may take a name that nobody answers to yet, but not replace one that does.
    """
    if promote != "gate":
        return promote == "always"
    if report is None:
        return False
    return report.verdict == "passed" or (report.verdict == "inconclusive" and report.compared_with is None)
