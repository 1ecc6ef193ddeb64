"""DynaMO's rollout allocation as published and as released (arXiv 2602.19208); k right of G rollouts so far.

    P_i = k_i (G_i - k_i) / (G_i (G_i - 1))        the unbiased Bernoulli variance, with all history and no decay

Both leave out what their source leaves out: standard deviations (the optimum of the theory), forgetting, and a weight
1 / n_i that would keep the objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmark.history import HistoryView
from methods.allocation import Floats, Ints, bounds, min_variance_allocation


def bernoulli_variance(history: HistoryView) -> Floats:
    """P_i, (P,); not a number where fewer than two rollouts are known."""
    k, G = history.successes, history.trials
    with np.errstate(divide="ignore", invalid="ignore"):
        variance: Floats = np.where(G >= 2, k * (G - k) / (G * (G - 1)), np.nan)
    return variance


@dataclass(frozen=True)
class ReadmeAllocation:
    """n_i = B P_i / sum_k P_k, clamped to [n_low, n_high].

    The text does not say what keeps the sum after clamping, nor what an unseen prompt gets. Here the clamped rule is
    clip(lambda P_i, n_low, n_high) with the lambda that meets B, in integers (`min_variance_allocation` with s = P),
    and an unseen prompt has the variance of p = 1/2.

    Attributes:
        n_low, n_high: bounds per prompt; see `methods.allocation.bounds`.
    """

    n_low: int | None = None
    n_high: int | None = None

    def __call__(self, history: HistoryView, budget: int) -> Ints:
        """Rollouts per prompt, (P,) int64, summing to `budget`."""
        low, high = bounds(len(history), budget, self.n_low, self.n_high)
        return min_variance_allocation(np.nan_to_num(bernoulli_variance(history), nan=0.25), budget, low, high)


@dataclass(frozen=True)
class ReleasedAllocation:
    """n_i = n_low + share of P_i, as the released code computes it.

    1. priority: P_i + 1e-6 (1 - acc), at least `least`; `least` where acc >= `mastery`; none before `explored` rollouts
    2. every prompt gets n_low, an unexplored one max(n_low, explored) less what is known of it
    3. the rest goes to prompts with a priority in proportion to it, by largest remainders, capped at n_high, repeatedly
    4. where no prompt has a priority and room, the rest goes round one by one

    Step 4 keeps to n_high here, which the released code forgets; no step leaves the budget.

    Attributes:
        n_low, n_high: bounds per prompt; see `methods.allocation.bounds`.
        explored, mastery, least: the released constants.
    """

    n_low: int | None = None
    n_high: int | None = None
    explored: int = 4
    mastery: float = 0.85
    least: float = 0.01

    def priority(self, history: HistoryView) -> Floats:
        """Step 1, (P,); 0 for an unexplored prompt."""
        acc = history.successes / np.maximum(history.trials, 1)
        value = np.maximum(np.nan_to_num(bernoulli_variance(history)) + 1e-6 * (1 - acc), self.least)
        return np.where(history.trials < self.explored, 0.0, np.where(acc >= self.mastery, self.least, value))

    def __call__(self, history: HistoryView, budget: int) -> Ints:
        """Rollouts per prompt, (P,) int64, summing to `budget`."""
        low, high = bounds(len(history), budget, self.n_low, self.n_high)
        priority = self.priority(history)
        n = np.full(len(history), low, dtype=np.int64)
        wanted = np.where(priority > 0, 0, max(low, self.explored) - history.trials.astype(np.int64))
        wanted = np.clip(wanted, n, high) - n
        n += np.clip(budget - n.sum() - (np.cumsum(wanted) - wanted), 0, wanted)
        while (left := budget - int(n.sum())) > 0:
            open_ = (priority > 0) & (n < high)
            n += _shares(np.where(open_, priority, 0.0), left, high - n) if open_.any() else _round(n < high, left)
        return n


def _shares(weight: Floats, left: int, room: Ints) -> Ints:
    """`left` units in proportion to `weight` by largest remainders, capped at `room`: some may stay."""
    share = left * weight / weight.sum()
    units = np.floor(share).astype(np.int64)
    rest = np.argsort(units - share, kind="stable")[: left - units.sum()]
    units[rest] += 1
    result: Ints = np.minimum(units, room)
    return result


def _round(open_: np.ndarray[tuple[int], np.dtype[np.bool_]], left: int) -> Ints:
    """One unit for each open prompt, in order, while units last."""
    return (open_ & (np.cumsum(open_) <= left)).astype(np.int64)
