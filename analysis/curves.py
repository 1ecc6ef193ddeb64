"""Accuracy as a function of what was spent: interpolation, area under the curve, cost to a target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.statistics import Floats


def at_costs(cost: Floats, values: Floats, grid: Floats) -> Floats:
    """One run's curve at other costs, by linear interpolation.

    Args:
        cost: (P,) costs of the evaluated points, never falling. values: (P, ...) what was measured there.
        grid: (G,) costs to read the curve at, within the range of `cost`.

    Returns:
        (G, ...) interpolated values.

    Raises:
        ValueError: `cost` falls, or `grid` leaves its range: a curve says nothing beyond its end.
    """
    if np.any(np.diff(cost) < 0):
        raise ValueError("the costs of a learning curve must not fall")
    slack = 1e-9 * cost[-1]
    if grid.min() < cost[0] - slack or grid.max() > cost[-1] + slack:
        raise ValueError(f"costs {grid.min():g} to {grid.max():g} are not within {cost[0]:g} to {cost[-1]:g}")
    basis = np.stack([np.interp(grid, cost, unit) for unit in np.eye(len(cost))], axis=1)
    return np.asarray(np.tensordot(basis, values, axes=1), dtype=np.float64)


def common_grid(costs: Sequence[Floats], limit: float | None = None) -> Floats:
    """Costs at which the mean of several runs' curves bends: all their points up to the cheapest run's end.

    Args:
        costs: (P,) of every run. limit: leave out what lies beyond.
    """
    end = min(float(cost[-1]) for cost in costs)
    end = end if limit is None else min(end, limit)
    begin = max(float(cost[0]) for cost in costs)
    inner = np.unique(np.concatenate(costs))
    return np.concatenate([[begin], inner[(inner > begin) & (inner < end)], [end]])


def area_under_curve(grid: Floats, curve: Floats) -> Floats:
    """Mean height of a curve over its costs: the trapezoid area divided by the range.

    Args:
        grid: (G,) costs. curve: (..., G) heights.
    """
    area = np.trapezoid(curve, grid, axis=-1) / (grid[-1] - grid[0])
    return np.asarray(area, dtype=np.float64)


def cost_to_target(grid: Floats, curve: Floats, target: Floats | float) -> Floats:
    """First cost at which a curve reaches the target, interpolated; infinity where it never does.

    Args:
        grid: (G,) increasing costs. curve: (..., G) heights. target: (...) or scalar.
    """
    goal = np.asarray(target, dtype=np.float64)[..., None]
    reached = curve >= goal
    first = np.argmax(reached, axis=-1)
    before = np.maximum(first - 1, 0)
    low = np.take_along_axis(curve, before[..., None], axis=-1)[..., 0]
    high = np.take_along_axis(curve, first[..., None], axis=-1)[..., 0]
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(first > 0, (goal[..., 0] - low) / rise, 0.0)
    cost = grid[before] + share * (grid[first] - grid[before])
    return np.where(reached.any(axis=-1), cost, np.inf)
