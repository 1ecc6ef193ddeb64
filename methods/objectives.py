"""What a rollout is worth: objectives of allocation, each by its exact integer optimum.

p: success rate of a prompt, s: standard deviation of its outcome, n: its rollouts.

    mean_only       minimise  sum s^2 / n                       advantage r - mean
    rloo            minimise  sum s^2 / (n - 1)                 leave-one-out advantage (n >= 2)
    std             minimise  sum (n - 1) / n^2 d(n)            advantage (r - mean) / std
    non_degenerate  maximise  sum d(n)                          groups with both outcomes
    knapsack        maximise  sum d(n) p (1 - p)^2              Knapsack RL (arXiv 2509.25849)

    d(n) = 1 - p^n - (1 - p)^n      probability that a group holds both outcomes

The first two are the same problem, shifted by one rollout. `non_degenerate` has falling gains from n = 1 on, so taking
units by their gain is optimal. `std` and `knapsack` weigh rare outcomes so that a second rollout can be worth more
than the first: no threshold finds their optimum, dynamic programming does. Minimising `std` is a warning rather than
advice: a group with no advantage has no variance, so it starves hard prompts.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from methods.allocation import Floats, Ints, min_variance_allocation
from methods.separable import best_gains, best_values

Objective = Literal["mean_only", "rloo", "std", "non_degenerate", "knapsack"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
LEAST: dict[Objective, int] = {"rloo": 2, "non_degenerate": 1}
"""Rollouts that every prompt needs for the objective to be finite or concave; 0 where not named."""


def both_outcomes(p: Floats, n: Floats | Ints) -> Floats:
    """d(n) = 1 - p^n - (1 - p)^n, broadcast; 0 for n < 2."""
    result: Floats = np.where(np.asarray(n) < 2, 0.0, 1 - p**n - (1 - p) ** n)
    return result


def gvm_weight(p: ArrayLike, gradient_norm: ArrayLike, alpha: float = 1e-3, beta: float = 2.0) -> Floats:
    """GVM's weight w = G / sqrt(p + alpha / p^(beta - 1)), 0 where G or p is 0 (arXiv 2505.02391, released code).

    n proportional to w within bounds is `min_variance_allocation` with s = w.
    """
    p, G = np.asarray(p, dtype=np.float64), np.asarray(gradient_norm, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.where((p > 0) & (G > 0), G / np.sqrt(p + alpha / np.maximum(p, 1e-300) ** (beta - 1)), 0.0)


def allocate(objective: Objective, p: Floats, s: Floats, budget: int, n_low: int, n_high: int) -> Ints:
    """Rollouts per prompt that optimise `objective`.

    Args:
        p, s: (P,) success rate and standard deviation of the outcome.
        budget: rollouts to give out.
        n_low, n_high: bounds of every prompt; `rloo` needs n_low >= 2 and `non_degenerate` n_low >= 1.

    Returns:
        (P,) int64, exactly optimal, summing to `budget`.

    Raises:
        ValueError: an unknown objective, bounds below what it needs, or a budget outside them.
    """
    least = LEAST.get(objective, 0)
    if n_low < least:
        raise ValueError(f"objective {objective} needs n_low >= {least}, got {n_low}")
    if objective == "mean_only":
        return min_variance_allocation(s, budget, n_low, n_high)
    if objective == "rloo":
        return 1 + min_variance_allocation(s, budget - len(s), n_low - 1, n_high - 1)
    n = np.arange(n_low, n_high + 1)
    d = both_outcomes(p[:, None], n)
    if objective == "non_degenerate":
        return n_low + best_gains(np.diff(d, axis=1), budget - n_low * len(p))
    if objective == "std":
        return n_low + best_values(-(n - 1) / np.maximum(n, 1) ** 2 * d, budget - n_low * len(p))
    if objective == "knapsack":
        return n_low + best_values(d * (p * (1 - p) ** 2)[:, None], budget - n_low * len(p))
    raise ValueError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}")
