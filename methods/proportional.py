"""Rollouts in proportion to weights: n_i = B w_i / sum_k w_k, rounded so that sum_i n_i = B."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from methods.allocation import Ints


def proportional(weight: ArrayLike, budget: int) -> Ints:
    """`budget` units in proportion to `weight` (N,) >= 0, by largest remainders; ties go to the earlier.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    w = np.asarray(weight, dtype=np.float64)
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError("weights must be finite, >= 0 and not all 0")
    share = budget * (w / w.max()) / (w / w.max()).sum()
    n: Ints = np.floor(share).astype(np.int64)
    n[np.argsort(n - share, kind="stable")[: budget - int(n.sum())]] += 1
    return n
