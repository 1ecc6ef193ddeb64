"""Exact integer optima of separable objectives: units for rows, so that the sum of their worth is largest."""

from __future__ import annotations

import numpy as np

from methods.allocation import Floats, Ints


def best_gains(gain: Floats, units: int) -> Ints:
    """Units per row of the `units` largest entries of `gain` (P, K), whose rows do not increase; (P,) int64.

    Exactly optimal for concave values. Equal gains go to the lower unit, then to the earlier row.

    Raises:
        ValueError: `units` is outside [0, P K].
    """
    rows, most = gain.shape
    _feasible(units, rows, most)
    if units == 0:
        return np.zeros(rows, dtype=np.int64)
    # Rounding must not let a unit overtake the one before it.
    falling = np.minimum.accumulate(gain, axis=1)
    threshold = np.partition(falling, falling.size - units, axis=None)[falling.size - units]
    result: Ints = (falling > threshold).sum(axis=1)
    _, owner = np.nonzero((falling == threshold).T)
    result += np.bincount(owner[: units - int(result.sum())], minlength=rows)
    return result


def best_values(value: Floats, units: int) -> Ints:
    """Units per row that maximise the sum of ``value[i, units_i]``, summing to `units`; any values, exactly.

    Dynamic programming over rows, (max, +) convolution over units: O(P units K) time, O(P units) memory.

    Args:
        value: (P, K + 1), worth of 0 .. K units.

    Returns:
        (P,) int64; of equal optima the one that gives later rows fewer units.

    Raises:
        ValueError: `units` is outside [0, P K].
    """
    rows, most = len(value), value.shape[1] - 1
    _feasible(units, rows, most)
    best = np.full(units + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((rows, units + 1), dtype=np.int32)
    for row in range(rows):
        merged = best + value[row, 0]
        for given in range(1, min(most, units) + 1):
            candidate = best[:-given] + value[row, given]
            better = candidate > merged[given:]
            merged[given:][better] = candidate[better]
            choice[row, given:][better] = given
        best = merged
    result = np.zeros(rows, dtype=np.int64)
    for row in range(rows - 1, -1, -1):
        result[row] = choice[row, units]
        units -= int(result[row])
    return result


def _feasible(units: int, rows: int, most: int) -> None:
    if not 0 <= units <= rows * most:
        raise ValueError(f"{units} rollouts beyond the lower bounds are outside [0, {rows * most}] for {rows} prompts")
