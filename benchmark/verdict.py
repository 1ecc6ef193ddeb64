"""What verification says about one rollout, and the reward that follows."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Verdict(StrEnum):
    """Outcome of one rollout; never a bare number, so that failures are counted and not mistaken for wrong."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    GOLD_UNPARSABLE = "gold_unparsable"
    TIMEOUT = "timeout"
    ERROR = "error"


def reward(verdict: Verdict) -> float:
    """1.0 for a correct rollout, else 0.0."""
    return 1.0 if verdict is Verdict.CORRECT else 0.0


def flipped(verdicts: Sequence[Verdict], flips: Sequence[bool]) -> list[Verdict]:
    """Verdicts of a verifier that errs where it `flips`: a correct rollout counts as wrong, any other as correct."""
    opposite = (Verdict.WRONG if verdict is Verdict.CORRECT else Verdict.CORRECT for verdict in verdicts)
    return [other if flip else verdict for verdict, other, flip in zip(verdicts, opposite, flips, strict=True)]
