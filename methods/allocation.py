"""Rollout allocation of minimum variance, exact in integers.

    minimise sum_i s_i^2 / n_i   subject to   sum_i n_i = B,  lo_i <= n_i <= hi_i,  n_i integer

The objective is separable and convex, so taking units in order of their gain g_i(n) = s_i^2 / (n (n - 1)) (the fall
of the objective when prompt i gets its n-th rollout) is optimal. A search on the gain's threshold replaces the greedy
loop: O(N) per probe, no Python loop over prompts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def bounds(prompts: int, budget: int, n_low: int | None, n_high: int | None) -> tuple[int, int]:
    """Bounds (lo, hi) per prompt with prompts * lo <= budget <= prompts * hi.

    ``None`` is half and one and a half times the mean (the published 8 and 24 of 16). Where a batch is smaller than
    the bounds allow, they widen to the mean.
    """
    mean = budget / prompts
    low = int(mean / 2) if n_low is None else n_low
    high = int(np.ceil(1.5 * mean)) if n_high is None else n_high
    return min(low, int(mean)), max(high, int(np.ceil(mean)))


def min_variance_allocation(s: ArrayLike, budget: int, n_low: ArrayLike, n_high: ArrayLike) -> Ints:
    """Integer allocation that minimises sum s_i^2 / n_i.

    Args:
        s: (N,) standard deviations, >= 0.
        budget: rollouts to give out, sum of the result.
        n_low, n_high: bounds, (N,) or scalar integers, 0 <= n_low <= n_high.

    Returns:
        (N,) int64, exactly optimal. Ties go to the larger s, then to the earlier prompt; what is left when every
        prompt with s > 0 is at its upper bound fills the prompts with s = 0 evenly. With n_low = 0 a prompt with s > 0
        gets its first rollout before any other gets a second one.

    Raises:
        ValueError: negative or non-finite s, crossed bounds, or a budget outside [sum n_low, sum n_high].
    """
    deviation = np.asarray(s, dtype=np.float64)
    low = np.broadcast_to(np.asarray(n_low), deviation.shape).astype(np.int64)
    high = np.broadcast_to(np.asarray(n_high), deviation.shape).astype(np.int64)
    if deviation.ndim != 1 or not np.isfinite(deviation).all() or (deviation < 0).any():
        raise ValueError("s must be a vector of finite standard deviations >= 0")
    if (low < 0).any() or (low > high).any():
        raise ValueError(f"bounds need 0 <= n_low <= n_high, got n_low {low.min()} and n_high {high.min()}")
    if not low.sum() <= budget <= high.sum():
        raise ValueError(f"budget {budget} is outside [{low.sum()}, {high.sum()}] for {len(deviation)} prompts")
    weight = (deviation / max(deviation.max(initial=0.0), 1e-300)) ** 2
    reach = np.where(weight > 0, high, low)
    if budget >= reach.sum():
        return _fill_evenly(reach, high, int(budget - reach.sum()))
    first = np.maximum(low, np.minimum(reach, 1))
    # Below that, gains are infinite (a first rollout) and no threshold separates them.
    below, above = (low, first) if budget < first.sum() else _bracket(weight, budget, low, reach)
    return _best_units(weight, budget, below, above)


def _units(weight: Floats, threshold: float, low: Ints, high: Ints) -> Ints:
    """Rollouts whose gain reaches `threshold`: the largest n with weight >= threshold n (n - 1)."""
    # Weights of very different size: a threshold that underflows lets everything in, as it should.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        wanted = np.nan_to_num(np.floor((1 + np.sqrt(1 + 4 * weight / threshold)) / 2), nan=0.0)
    units: Ints = np.clip(np.minimum(wanted, 2.0**62).astype(np.int64), low, high)
    return units


def _bracket(weight: Floats, budget: int, low: Ints, high: Ints, probes: int = 40) -> tuple[Ints, Ints]:
    """Allocations of two thresholds that enclose the optimum: sum(below) <= budget <= sum(above)."""
    few, many = 0.0, -2 * np.log(high.max(initial=1) + 1.0) + np.log(weight[weight > 0].min())
    for _ in range(probes):
        middle = (few + many) / 2
        if _units(weight, float(np.exp(middle)), low, high).sum() > budget:
            many = middle
        else:
            few = middle
        if few - many < 1e-6:
            break
    # The margin outweighs the rounding of the closed form for n; `_best_units` settles what lies between.
    return _units(weight, float(np.exp(few + 1e-9)), low, high), _units(weight, float(np.exp(many - 1e-9)), low, high)


def _best_units(weight: Floats, budget: int, below: Ints, above: Ints) -> Ints:
    """Start at `below` and take the units of largest gain among those up to `above`."""
    spare = above - below
    owner = np.repeat(np.arange(len(weight)), spare)
    ordinal = np.arange(len(owner)) - np.repeat(np.cumsum(spare) - spare, spare)
    n = below[owner] + ordinal + 1.0
    with np.errstate(divide="ignore"):
        gain = np.where(n == 1, np.inf, weight[owner] / (n * (n - 1)))
    chosen = np.lexsort((owner, -weight[owner], -gain))[: budget - below.sum()]
    result: Ints = below + np.bincount(owner[chosen], minlength=len(weight))
    return result


def _fill_evenly(n: Ints, high: Ints, left: int) -> Ints:
    """Raise the lowest entries together until `left` units are used; the remainder goes to the earliest."""
    if left == 0:
        return n
    level_low, level_high = int(n.min()), int(high.max())
    while level_low < level_high:
        middle = (level_low + level_high + 1) // 2
        if (np.clip(middle, n, high) - n).sum() <= left:
            level_low = middle
        else:
            level_high = middle - 1
    filled: Ints = np.clip(level_low, n, high)
    rest = left - int((filled - n).sum())
    open_slots = np.flatnonzero((filled == level_low) & (filled < high))[:rest]
    filled[open_slots] += 1
    return filled
