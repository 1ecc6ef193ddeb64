"""Answering the claims that a study stated before any run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import counted, interval, metric_name, p_value, points
from analysis.statistics import holm

SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE = "supported", "not supported", "inconclusive"
LEVEL = 0.05

RULE = (
    "A claim is supported if the two-level 95 % interval of the paired difference (seeds and problems, final "
    "evaluation, mean over families) lies above the effect it has to exceed and the Holm-adjusted p, over the "
    "claims of the study, is below .05; not supported if the interval lies below that effect; inconclusive "
    "otherwise. The interval is the primary criterion: it is the one that holds the differences between training "
    "seeds and between problems."
)


@dataclass(frozen=True)
class Answer:
    """A claim and what the study says to it.

    Attributes:
        difference: arm minus reference, mean over families; None where the two share no done seed.
        holm: p against `min_effect`, adjusted over the claims of the study.
        verdict: one of `SUPPORTED`, `NOT_SUPPORTED`, `INCONCLUSIVE`. reason: in a sentence.
    """

    id: str
    text: str
    arm: str
    reference: str
    metric: str
    min_effect: float
    difference: Difference | None
    holm: float = float("nan")
    verdict: str = INCONCLUSIVE
    reason: str = ""


def answer_claims(scores: Scores, claims: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Answer every claim by `RULE`.

    Args:
        claims: mappings with id, text, arm, and optionally reference, metric and min_effect (a fraction).
    """
    open_answers = [_measured(scores, claim) for claim in claims]
    p = [float("nan") if a.difference is None else a.difference.p for a in open_answers]
    return [
        decide(replace(answer, holm=float(adjusted))) for answer, adjusted in zip(open_answers, holm(p), strict=True)
    ]


def _measured(scores: Scores, claim: Mapping[str, Any]) -> Answer:
    study = scores.study
    arm, reference = str(claim["arm"]), str(claim.get("reference") or study.reference)
    metric, effect = str(claim.get("metric") or study.metric), float(claim.get("min_effect") or 0.0)
    found = scores.differences([(arm, reference)], metric, margin=effect)
    average = next((difference for difference in found if difference.family == AVERAGE), None)
    text = str(claim.get("text") or f"{arm} beats {reference} in {metric_name(metric)}")
    return Answer(str(claim.get("id", arm)), text, arm, reference, metric, effect, average)


def decide(answer: Answer) -> Answer:
    """The answer with its verdict and the reason for it, by `RULE`."""
    d, effect = answer.difference, answer.min_effect
    if d is None:
        why = f"{answer.arm} and {answer.reference} have no finished seed in common."
        return replace(answer, verdict=INCONCLUSIVE, reason=why)
    measured = (
        f"{answer.arm} minus {answer.reference} in {metric_name(answer.metric)}: {points(d.mean, sign=True)} points, "
        f"95 % interval {interval(d.low, d.high)}, Holm p {p_value(answer.holm)}, {counted(d.seeds, 'seed')}"
    )
    if d.seeds < 2:
        return replace(answer, verdict=INCONCLUSIVE, reason=f"{measured}: one seed cannot decide.")
    if d.low > effect and answer.holm < LEVEL:
        return replace(answer, verdict=SUPPORTED, reason=f"{measured}.")
    if d.high < effect:
        return replace(answer, verdict=NOT_SUPPORTED, reason=f"{measured}.")
    if d.low > effect:
        why = f"{measured}: the interval lies above, but not p after Holm's correction."
        return replace(answer, verdict=INCONCLUSIVE, reason=why)
    smallest = d.detectable()
    detectable = f"; detectable were {points(smallest)} points" if math.isfinite(smallest) else ""
    return replace(answer, verdict=INCONCLUSIVE, reason=f"{measured}{detectable}.")
