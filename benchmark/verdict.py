"""What verification says about one rollout, and the reward that follows."""

from __future__ import annotations

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
