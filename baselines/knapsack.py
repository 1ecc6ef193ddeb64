"""Knapsack RL: rollouts as a knapsack whose items are groups with a gradient (arXiv 2509.25849).

    maximise sum_i V(n_i, p_i),   V = (1 - p^n - (1 - p)^n) p (1 - p)^2,   n_i in [2, 128], sum n_i = B

p_i is the success rate of the latest visit. A prompt solved or failed altogether then is worth nothing and keeps the
minimum; what the others cannot hold goes to the failed ones first. The first visit is uniform. V is not concave for
small p: solved exactly by dynamic programming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from baselines.grpo import GRPO
from benchmark.history import HistoryView
from benchmark.method import Change
from methods.allocation import bounds, min_variance_allocation
from methods.objectives import both_outcomes
from methods.separable import best_values


@dataclass(frozen=True)
class Knapsack(GRPO):
    """Allocation by the expected worth of a group's gradient."""

    family: ClassVar[str] = "allocation"
    changes: ClassVar[tuple[Change, ...]] = ("allocation",)
    reference: ClassVar[str] = "2509.25849"
    faithful_to: ClassVar[str] = "the paper's value and bounds; GRPO's loss, so prompts weigh by n_i"

    n_low: int = 2
    n_high: int = 128

    def allocate(self, history: HistoryView, budget: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Exactly optimal n_i, (P,) int64; uniform while a prompt of the batch is new."""
        if (history.visits == 0).any():
            return super().allocate(history, budget, rng)
        low, high = bounds(len(history), budget, self.n_low, self.n_high)
        p = history.last_successes / np.maximum(history.last_trials, 1)
        live, n = (p > 0) & (p < 1), np.full(len(p), low, dtype=np.int64)
        room = min(high - low, budget - int(n.sum()))
        units = min(budget - int(n.sum()), int(live.sum()) * room)
        sizes = np.arange(low, low + room + 1)
        value = both_outcomes(p[live, None], sizes) * (p * (1 - p) ** 2)[live, None]
        n[live] += best_values(value, units)
        failed = p == 0
        for group in (failed, ~live & ~failed):
            left = min(budget - int(n.sum()), int(group.sum()) * (high - low))
            n[group] += min_variance_allocation(np.zeros(group.sum()), left, 0, high - low)
        return n
