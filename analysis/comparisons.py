"""Scores of arms as matrices over seeds and problems, and the paired comparisons between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from analysis.resampling import bootstrap_for, sign_flip_test, spread, swap_tests
from analysis.results import Study, k_of
from analysis.statistics import Estimate, Floats, detectable_shift, family_weights, pass_at_k, strata

AVERAGE = "average"
"""The group that stands for all families, each with the same weight."""

Pair = tuple[str, str]
"""An arm and the arm that it is compared with."""


@dataclass(frozen=True)
class Difference:
    """A paired difference between two arms, in fractions (not percentage points).

    Attributes:
        family: a task family, or `AVERAGE`.
        seeds: how many seeds both arms have.
        mean, low, high: the difference and its two-level 95 % interval.
        p: two-sided, studentised label swaps. p_seeds: two-sided, sign flips of whole seeds.
        error: standard error over seeds and problems. seed_sd: standard deviation of the seed means.
    """

    arm: str
    reference: str
    metric: str
    family: str
    seeds: int
    mean: float
    low: float
    high: float
    p: float
    p_seeds: float
    error: float
    seed_sd: float

    def detectable(self, comparisons: int = 1) -> float:
        """True difference found with 80 % probability at level .05 / `comparisons`.

        NaN for one seed, and where nothing differs in any cell, which says nothing about what could.
        """
        if self.error == 0:
            return math.nan
        return self.error * detectable_shift(self.seeds, alpha=0.05 / comparisons)


class Scores:
    """Scores of every done cell of a study, by item, in one order of items for all.

    Attributes:
        study: where the scores come from.
        items: (I,) item names. families: (I,) the family of each.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        kinds = study.evaluations.drop_duplicates("item").set_index("item")["family"]
        self.items = [str(item) for family in study.families for item in kinds.index[kinds == family]]
        self.families = tuple(str(kinds[item]) for item in self.items)
        cells = [(str(row["arm"]), int(row["seed"])) for row in study.done.to_dict("records")]
        points = study.points.sort_values("point").groupby(["arm", "seed"])
        self._points = {cell: points.get_group(cell) for cell in cells}
        self._counts: dict[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        evaluations = study.evaluations.groupby(["arm", "seed"])
        for cell in cells:
            wide = evaluations.get_group(cell).pivot(index="point", columns="item", values=["n", "c"])
            n, c = (wide[column][self.items].to_numpy().astype(np.int64) for column in ("n", "c"))
            self._counts[cell] = n, c

    @cached_property
    def groups(self) -> list[str]:
        """`AVERAGE`, then the families; the average alone where there is one family."""
        return [AVERAGE, *self.study.families] if len(self.study.families) > 1 else [AVERAGE]

    @cached_property
    def curve_metric(self) -> str:
        """The metric of learning curves: the primary one, or pass@1 where early points have too few
        samples.
        """
        fewest = min(int(n.min()) for n, _ in self._counts.values())
        return self.study.metric if k_of(self.study.metric) <= fewest else "pass_at_1"

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that all the arms have, sorted."""
        have = [{seed for name, seed in self._counts if name == arm} for arm in arms]
        return sorted(set.intersection(*have))

    def positions(self, family: str) -> list[int]:
        """Columns of a family's items."""
        return [i for i, name in enumerate(self.families) if family in (AVERAGE, name)]

    def curve(self, arm: str, seed: int, metric: str) -> Floats:
        """(P, I) pass@k at every evaluation point; the last row is the final evaluation.

        Raises:
            ValueError: a point has fewer than k samples.
        """
        n, c = self._counts[arm, seed]
        return pass_at_k(n, c, k_of(metric))

    def costs(self, arm: str, seed: int, currency: str) -> Floats:
        """(P,) training spend at every evaluation point."""
        return np.asarray(self._points[arm, seed][currency], dtype=np.float64)

    def final(self, arm: str, metric: str, seeds: Sequence[int] | None = None) -> Floats:
        """(S, I) pass@k of the final evaluation, of all seeds of the arm or of those named."""
        cells = [self._counts[arm, seed] for seed in (self.seeds(arm) if seeds is None else seeds)]
        n, c = (np.stack([cell[part][-1] for cell in cells]) for part in (0, 1))
        return pass_at_k(n, c, k_of(metric))

    def family_scores(self, arm: str, metric: str, seeds: Sequence[int] | None = None) -> Floats:
        """(S, F) mean score of every seed and family."""
        final = self.final(arm, metric, seeds)
        return np.stack([final[:, group].mean(axis=1) for group in strata(self.families)], axis=1)

    def estimate(self, values: Floats, family: str = AVERAGE, *, problems: bool = True) -> Estimate:
        """Mean and two-level 95 % interval of (S, I) or (S, I, G) values over a family, or over all.

        Args:
            problems: False keeps the problems as they are: the interval then holds the luck of training only.
        """
        places = self.positions(family)
        families = tuple(self.families[i] for i in places)
        return bootstrap_for(len(values), families).estimate(values[:, places], problems=problems)

    def paired(self, pair: Pair, metric: str) -> Floats:
        """(S, I) final differences over the seeds that both arms have."""
        seeds = self.seeds(*pair)
        return self.final(pair[0], metric, seeds) - self.final(pair[1], metric, seeds)

    def differences(self, pairs: Sequence[Pair], metric: str, *, margin: float = 0.0) -> list[Difference]:
        """Final differences of every pair and group; a pair without a common seed is left out.

        Args:
            margin: the difference that p-values test against.
        """
        found: dict[Pair, list[Difference]] = {}
        # Pairs with the same number of seeds see the same label swaps.
        for count in sorted({len(self.seeds(*pair)) for pair in pairs} - {0}):
            batch = [pair for pair in pairs if len(self.seeds(*pair)) == count]
            values = np.stack([self.paired(pair, metric) for pair in batch])
            p = swap_tests(values - margin, self.families)
            for pair, paired, row in zip(batch, values, p, strict=True):
                found[pair] = [
                    self._difference(pair, metric, family, paired, margin, float(row[place]))
                    for place, family in enumerate(self.groups)
                ]
        return [difference for pair in pairs for difference in found.get(pair, [])]

    def _difference(self, pair: Pair, metric: str, family: str, values: Floats, margin: float, p: float) -> Difference:
        places = self.positions(family)
        families = [self.families[i] for i in places]
        estimate, doubt = self.estimate(values, family), spread(values[:, places], families)
        rows = values[:, places] @ family_weights(families)
        return Difference(
            *pair,
            metric=metric,
            family=family,
            seeds=len(values),
            mean=float(estimate.mean),
            low=float(estimate.low),
            high=float(estimate.high),
            p=p,
            p_seeds=sign_flip_test(rows - margin),
            error=doubt.error,
            seed_sd=doubt.seed_sd,
        )

    def best_and_tied(self, metric: str, family: str) -> tuple[str, set[str]]:
        """The arm with the highest mean, and those whose paired difference to it has 0 in its interval."""
        arms, places = self.study.arms, self.positions(family)
        weights = family_weights([self.families[i] for i in places])
        best = max(arms, key=lambda arm: float((self.final(arm, metric)[:, places] @ weights).mean()))
        tied = set()
        for arm in arms:
            if arm != best and self.seeds(best, arm):
                estimate = self.estimate(self.paired((best, arm), metric), family)
                tied |= {arm} if estimate.low <= 0 <= estimate.high else set()
        return best, tied
