"""One sentence about two arms: which is better, by how much, at what confidence, at what cost."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import counted, currency_name, exact, interval, metric_name, p_value, points
from analysis.results import Study, k_of, load_study
from analysis.statistics import CONFIDENCE
from analysis.table_scores import MOST_SEEDS, is_clear, seeds_for
from benchmark.errors import InputError
from benchmark.registry import suggest

COSTS = ("flops", "device_seconds")
"""Currencies in which arms may differ although they spent the same budget."""

SMALLEST_OF_INTEREST = 0.01
"""A point: where two arms are closer than this, the seeds for a true difference of a point are told instead."""


@dataclass(frozen=True)
class Comparison:
    """Two arms of a study, compared.

    Attributes:
        difference: first arm minus second, mean over families.
        winner: the better arm; None where the study cannot tell.
        problems: evaluation problems. budget, currency: what a run of either arm was given.
        costs: spend of a run of the first arm relative to the second, by currency; those that both spent.
        effect: the true difference that `seeds_needed` is about.
        seeds_needed: seeds at which it would be found with 80 % power; None: more than `MOST_SEEDS`.
    """

    study: str
    difference: Difference
    winner: str | None
    problems: int
    budget: float
    currency: str
    costs: dict[str, float]
    effect: float
    seeds_needed: int | None

    def sentence(self) -> str:
        """The answer."""
        d = self.difference
        paired = f"paired over {counted(d.seeds, 'seed')} and {counted(self.problems, 'problem')}"
        doubt = f"{100 * CONFIDENCE:g} % interval {{}}, {paired}, p {_p(d.p)}, not adjusted for other comparisons"
        if self.winner is None:
            return f"Inconclusive: {self._open(doubt)}{self._settled()}; {self._cost(d.arm, d.reference)}."
        sign = 1 if self.winner == d.arm else -1
        loser = d.reference if sign == 1 else d.arm
        ends = sorted((sign * d.low, sign * d.high))
        return (
            f"{self.winner} is better than {loser} by {points(sign * d.mean)} points of {metric_name(d.metric)} "
            f"({doubt.format(interval(*ends, sign=False))}); {self._cost(self.winner, loser)}."
        )

    def _open(self, doubt: str) -> str:
        d = self.difference
        seen = f"{d.arm} minus {d.reference} is {points(d.mean, sign=True)} points of {metric_name(d.metric)}"
        return f"{seen} ({doubt.format(interval(d.low, d.high))})"

    def _settled(self) -> str:
        """What the study could have found, and what it would take to find more."""
        d = self.difference
        if d.seeds < 2:
            return "; one seed cannot tell luck from effect: run at least two, better five"
        smallest = d.detectable()
        if not math.isfinite(smallest):
            return "; no two runs differ, so what could have been found is not known"
        power = f"; the smallest difference it could have found (80 % power) is {points(smallest)} points"
        size = f"a true difference of {points(self.effect)} points"
        if self.seeds_needed is None:
            return f"{power}, and {MOST_SEEDS} seeds would not find {size}: it would take more problems as well"
        if self.seeds_needed <= d.seeds:
            return f"{power}, and {size} would have been found, as a rule"
        return f"{power}, and to find {size} would take about {self.seeds_needed} seeds"

    def _cost(self, arm: str, other: str) -> str:
        same = f"both spent {exact(self.budget)} {currency_name(self.currency)} a run"
        turn = 1 if arm == self.difference.arm else -1
        told = [f"{ratio**turn:.2f} times the {currency_name(currency)}" for currency, ratio in self.costs.items()]
        return f"{same}, {arm} at {' and '.join(told)} of {other}" if told else same

    def record(self) -> dict[str, Any]:
        """Everything as plain values, differences in fractions; what is not known is None."""
        d = self.difference
        numbers = {key: _known(value) for key, value in asdict(d).items()}
        return numbers | {
            "study": self.study,
            "sentence": self.sentence(),
            "winner": self.winner,
            "confidence": CONFIDENCE,
            "adjusted": False,
            "detectable": _known(d.detectable()),
            "effect": self.effect,
            "seeds_needed": self.seeds_needed,
            "problems": self.problems,
            "budget": {self.currency: self.budget},
            "cost_ratio": self.costs,
        }


def compare(folder: Path, arm: str, other: str, metric: str | None = None) -> Comparison:
    """Compare two arms of a study by their paired final scores.

    Args:
        folder: ``results/<study>``. metric: ``pass_at_<k>``; the study's primary metric by default.

    Raises:
        InputError: no study there, an arm without a finished run, no seed in common, or too few samples for the metric.
    """
    study = load_study(folder)
    chosen = metric or study.metric
    if k_of(chosen) > study.samples:
        raise InputError(
            f"the final evaluation has only {study.samples} samples of a problem",
            key="--metric",
            value=chosen,
            remedy=f"Choose one of {', '.join(study.metrics)}",
        )
    scores = Scores(study)
    d = next(d for d in differences(scores, arm, other, chosen) if d.family == AVERAGE)
    ahead = arm if d.mean > 0 else other
    effect = max(abs(d.mean), SMALLEST_OF_INTEREST)
    return Comparison(
        study.name,
        d,
        ahead if is_clear(d, d.p) else None,
        len(scores.items),
        float(study.done["planned"].iloc[0]),
        str(study.done["planned_currency"].iloc[0]),
        _ratios(scores, arm, other),
        effect,
        seeds_for(effect, [d]) if d.seeds > 1 and d.error > 0 else None,
    )


def differences(scores: Scores, arm: str, other: str, metric: str) -> list[Difference]:
    """Paired final differences of two arms, over all families first.

    Raises:
        InputError: an arm without a finished run, one arm twice, or no seed in common.
    """
    study = scores.study
    for name in (arm, other):
        _require(study, name)
    if arm == other:
        raise InputError("compared with itself", key="arm", value=arm, remedy="Name two arms")
    found = scores.differences([(arm, other)], metric)
    if not found:
        remedy = f"Run what is missing: rolloutbench study {study.name}"
        raise InputError(f"{arm} and {other} have no finished seed in common", file=study.folder, remedy=remedy)
    return found


def _require(study: Study, arm: str) -> None:
    if arm in study.arms:
        return
    if arm in study.plan["arms"]:
        remedy = f"Run what is missing: rolloutbench study {study.name}"
        raise InputError("no run of it is done", file=study.folder, key="arm", value=arm, remedy=remedy)
    remedy = f"{suggest(arm, study.arms)} A further arm goes into the study's file under `arms`"
    raise InputError("not an arm of this study", file=study.folder, key="arm", value=arm, remedy=remedy)


def _ratios(scores: Scores, arm: str, other: str) -> dict[str, float]:
    """Mean spend of the first arm over that of the second, over the seeds that both have."""
    seeds, done = scores.seeds(arm, other), scores.study.done
    done = done[done["seed"].isin(seeds)]
    means = [done.loc[done["arm"] == name, [f"spent/{c}" for c in COSTS]].mean() for name in (arm, other)]
    pairs = {c: (float(means[0][f"spent/{c}"]), float(means[1][f"spent/{c}"])) for c in COSTS}
    return {c: own / base for c, (own, base) in pairs.items() if own > 0 and base > 0}


def _p(p: float) -> str:
    text = p_value(p)
    return text.replace("<", "< ") if text.startswith("<") else f"= {text}"


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
