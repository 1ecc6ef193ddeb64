"""The allocators that the variance study compares: counts per prompt at one budget, within the same bounds.

Bounds are those of `NeymanAllocation` (half and one and a half times the mean) for every rule, so that none gains by
dropping prompts. A rule that states n_i proportional to w_i is clip(lambda w_i, n_low, n_high) in integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmark.history import HistoryView
from methods.allocation import bounds, min_variance_allocation
from methods.gradient_allocation import GradientAllocation
from methods.neyman import NeymanAllocation, expected_deviation
from methods.objectives import allocate, gvm_weight
from methods.released_allocation import ReadmeAllocation, ReleasedAllocation
from methods.separable import best_values

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PRIOR = NeymanAllocation().prior


@dataclass(frozen=True)
class Known:
    """What a rule may read of P prompts: a small history sample, apart from the pool that scores it.

    Attributes:
        history: successes and trials of the sample.
        norm: (P, 2) mean norm of the embedding's gradient of a wrong and of a right rollout of the sample, 0 without
            one. square: (P, 2) mean of its square.
    """

    history: HistoryView
    norm: Floats
    square: Floats

    @property
    def p(self) -> Floats:
        """Success rate of the sample, (P,)."""
        return self.history.successes / self.history.trials


def bernoulli(known: Known) -> Floats:
    """Standard deviation E[sqrt(p (1 - p))] under the Beta posterior, (P,)."""
    return expected_deviation(*known.history.posterior(PRIOR))


def gvm(known: Known) -> Floats:
    """GVM's weight with G the mean norm of right rollouts (arXiv 2505.02391), (P,)."""
    return gvm_weight(known.p, known.norm[:, 1])


def cures(known: Known) -> Floats:
    """sigma with sigma^2 = p q^2 E g_c^2 + p^2 q E g_w^2 - p^2 q^2 (E g_c - E g_w)^2 (arXiv 2510.01037)."""
    p = known.p
    q = 1 - p
    square = p * q**2 * known.square[:, 1] + p**2 * q * known.square[:, 0]
    return np.sqrt(np.maximum(square - (p * q * (known.norm[:, 1] - known.norm[:, 0])) ** 2, 0.0))


def gradient(known: Known) -> Floats:
    """`dynamo_gradient`'s s_i, (P,)."""
    return GradientAllocation(prior=PRIOR).deviations(known.history)


def _proportional(weight: Callable[[Known], Floats]) -> Callable[[Known, int], Ints]:
    def rule(known: Known, budget: int) -> Ints:
        low, high = bounds(len(known.history), budget, None, None)
        return min_variance_allocation(weight(known), budget, low, high)

    return rule


def _posterior_variance(known: Known) -> Floats:
    a, b = known.history.posterior(PRIOR)
    return a * b / ((a + b) * (a + b + 1))


def _knapsack(known: Known, budget: int) -> Ints:
    low, high = bounds(len(known.history), budget, None, None)
    return allocate("knapsack", known.p, bernoulli(known), budget, low, high)


RULES: dict[str, Callable[[Known, int], Ints]] = {
    "uniform": _proportional(lambda known: np.ones(len(known.history))),
    "dynamo_released": lambda known, budget: ReleasedAllocation()(known.history, budget),
    "dynamo_readme": lambda known, budget: ReadmeAllocation()(known.history, budget),
    "variance": _proportional(_posterior_variance),
    "neyman": _proportional(bernoulli),
    "gvm": _proportional(gvm),
    "knapsack": _knapsack,
    "cures": _proportional(cures),
    "gradient": _proportional(gradient),
}
"""Rules that read the history sample, by name: (known, budget) -> (P,) int64."""

ORACLES = ("oracle_p", "oracle_variance", "oracle_unbounded")
"""Limits, not rules: Neyman with the p, and the best allocation for the V_i(n), of one half of the pool, scored on the
other half; the last without the common bounds (2 rollouts at least, as many at most as half a pool can score)."""

NAMES = (*RULES, *ORACLES)
LABELS = {
    "uniform": "uniform",
    "dynamo_released": "DynaMO, released code",
    "dynamo_readme": "DynaMO, published formula",
    "variance": "variance of the posterior",
    "neyman": "Neyman (standard deviation)",
    "gvm": "GVM",
    "knapsack": "Knapsack",
    "cures": "CurES",
    "gradient": "length and entropy (ours)",
    "oracle_p": "Neyman, oracle p",
    "oracle_variance": "oracle variance",
    "oracle_unbounded": "oracle variance, no bounds",
}
"""How tables and figures call an allocator."""


def assumed_deviation(name: str, known: Known) -> Floats:
    """The s_i with which the rule predicts sum_i s_i^2 / n_i, (P,); the outcome's where it predicts no variance."""
    return {"gvm": gvm, "cures": cures, "gradient": gradient}.get(name, bernoulli)(known)


def predicted_ratio(s: Floats, n: Ints, uniform: Ints) -> float:
    """sum s_i^2 / n_i relative to that of `uniform`."""
    return float((s**2 / n).sum() / (s**2 / uniform).sum())


def oracle_p(p: Floats, budget: int) -> Ints:
    """Neyman's allocation with s_i = sqrt(p_i (1 - p_i)), (P,) int64."""
    low, high = bounds(len(p), budget, None, None)
    return min_variance_allocation(np.sqrt(p * (1 - p)), budget, low, high)


def oracle_variance(curve: Floats, budget: int, limits: tuple[int, int] | None = None) -> Ints:
    """The allocation of least sum_i curve[i, n_i] for measured V_i(n), n = 0..; (P,) int64.

    Args:
        curve: (P, N). limits: bounds per prompt, the common ones by default.
    """
    low, high = limits or bounds(len(curve), budget, None, None)
    return low + best_values(-curve[:, low : high + 1], budget - low * len(curve))
