"""Neyman allocation: rollouts in proportion to the standard deviation of a prompt's outcome, within bounds.

s_i = E[sqrt(p_i (1 - p_i))],    p_i ~ Beta(a + successes, b + failures)
n_i minimises sum_i s_i^2 / n_i at the batch's budget

Other objectives of `methods.objectives` take the same posterior, p_i by its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from benchmark.history import HistoryView
from methods.allocation import Floats, Ints, bounds, min_variance_allocation
from methods.objectives import LEAST, Objective, allocate


def expected_deviation(a: Floats, b: Floats) -> Floats:
    """E[sqrt(p (1 - p))] for p ~ Beta(a, b): B(a + 1/2, b + 1/2) / B(a, b), elementwise."""
    half = gammaln(a + 0.5) + gammaln(b + 0.5) - gammaln(a + b + 1)
    result: Floats = np.exp(half - gammaln(a) - gammaln(b) + gammaln(a + b))
    return result


@dataclass(frozen=True)
class NeymanAllocation:
    """n_i proportional to the outcome's standard deviation, within bounds (Neyman allocation).

    s_i is the posterior mean of sqrt(p_i (1 - p_i)) under a Beta prior, so a prompt never seen has the prior's s and is
    explored by the same rule, and p-hat = 0 or 1 shrinks s_i without ever making it 0.

    Attributes:
        enabled: off gives every prompt the same number.
        n_low, n_high: bounds per prompt; see `methods.allocation.bounds`.
        prior: Beta(a, b) prior of a prompt's success rate.
        half_life: visits after which an outcome counts half, since the policy moves.
        objective: what n_i optimises. A batch too small for the least number it needs is split by ``mean_only``.
        explore: rollouts that a prompt never visited gets at least, before the rest is split; as many as the budget
            and n_high allow. ``None``: the prior decides.
        floor_unsolved, floor_solved: least s_i of a prompt whose remembered outcomes are all wrong, or all right.
            0 leaves it to the posterior; published rules differ most in what such prompts get.
    """

    enabled: bool = True
    n_low: int | None = None
    n_high: int | None = None
    prior: tuple[float, float] = (1.0, 1.0)
    half_life: float | None = 4.0
    objective: Objective = "mean_only"
    explore: int | None = None
    floor_unsolved: float = 0.0
    floor_solved: float = 0.0

    def __post_init__(self) -> None:
        if self.n_low is not None and self.n_high is not None and self.n_low > self.n_high:
            raise ValueError(f"n_low = {self.n_low} is above n_high = {self.n_high}")
        if min(self.prior) <= 0:
            raise ValueError(f"prior = {self.prior}: both parameters of the Beta prior must be positive")
        if not (0 <= self.floor_unsolved <= 0.5 and 0 <= self.floor_solved <= 0.5):
            raise ValueError(
                f"floor_unsolved = {self.floor_unsolved}, floor_solved = {self.floor_solved}: a standard deviation of "
                "right and wrong is in [0, 0.5]"
            )
        if self.explore is not None and (self.explore < 0 or self.objective != "mean_only"):
            raise ValueError(f"explore = {self.explore}: at least 0, and only with objective mean_only")

    def bounds(self, prompts: int, budget: int) -> tuple[int, int]:
        """Bounds (lo, hi) with prompts * lo <= budget <= prompts * hi."""
        return bounds(prompts, budget, self.n_low, self.n_high)

    def deviations(self, history: HistoryView) -> Floats:
        """s_i of every prompt, (P,)."""
        s = expected_deviation(*history.posterior(self.prior))
        known = history.trials > 0
        s = np.where(known & (history.successes == 0), np.maximum(s, self.floor_unsolved), s)
        return np.where(known & (history.successes == history.trials), np.maximum(s, self.floor_solved), s)

    def __call__(self, history: HistoryView, budget: int) -> Ints:
        """Rollouts per prompt, (P,) int64, summing to `budget`."""
        prompts, s = len(history), self.deviations(history)
        low, high = self.bounds(prompts, budget)
        if self.explore is not None:
            unseen = history.visits == 0
            spare = (budget - prompts * low) // max(1, int(unseen.sum()))
            lows = np.where(unseen, np.clip(self.explore, low, min(high, low + spare)), low)
            return min_variance_allocation(s, budget, lows, high)
        least = LEAST.get(self.objective, 0)
        if prompts * max(low, least) > budget:
            return min_variance_allocation(s, budget, low, high)
        a, b = history.posterior(self.prior)
        return allocate(self.objective, a / (a + b), s, budget, max(low, least), high)
