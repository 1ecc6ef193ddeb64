"""Neyman allocation: rollouts in proportion to the standard deviation of a prompt's outcome, within bounds.

s_i = E[sqrt(p_i (1 - p_i))],    p_i ~ Beta(a + successes, b + failures)
n_i minimises sum_i s_i^2 / n_i at the batch's budget
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from benchmark.history import HistoryView
from methods.allocation import Floats, Ints, bounds, min_variance_allocation


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
    """

    enabled: bool = True
    n_low: int | None = None
    n_high: int | None = None
    prior: tuple[float, float] = (1.0, 1.0)
    half_life: float | None = 4.0

    def __post_init__(self) -> None:
        if self.n_low is not None and self.n_high is not None and self.n_low > self.n_high:
            raise ValueError(f"n_low = {self.n_low} is above n_high = {self.n_high}")
        if min(self.prior) <= 0:
            raise ValueError(f"prior = {self.prior}: both parameters of the Beta prior must be positive")

    def bounds(self, prompts: int, budget: int) -> tuple[int, int]:
        """Bounds (lo, hi) with prompts * lo <= budget <= prompts * hi."""
        return bounds(prompts, budget, self.n_low, self.n_high)

    def __call__(self, history: HistoryView, budget: int) -> Ints:
        """Rollouts per prompt, (P,) int64, summing to `budget`."""
        low, high = self.bounds(len(history.trials), budget)
        return min_variance_allocation(expected_deviation(*history.posterior(self.prior)), budget, low, high)
