"""What accuracy costs: learning curves over any currency, area under them, cost to a target, equal
amounts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.comparisons import Scores
from analysis.curves import area_under_curve, at_costs, common_grid, cost_to_target
from analysis.resampling import bootstrap_for
from analysis.results import MEASURED
from analysis.statistics import Estimate, Floats
from benchmark.ledger import CURRENCIES


def curve_values(scores: Scores, arm: str, currency: str, grid: Floats, seeds: Sequence[int] | None = None) -> Floats:
    """(S, I, G) score of every seed and item at the costs of `grid`."""
    curves = [
        at_costs(scores.costs(arm, seed, currency), scores.curve(arm, seed, scores.curve_metric), grid)
        for seed in (scores.seeds(arm) if seeds is None else seeds)
    ]
    return np.moveaxis(np.stack(curves), 1, 2)


def arm_grid(scores: Scores, arm: str, currency: str, seeds: Sequence[int] | None = None) -> Floats:
    """Costs at which the arm's mean curve bends."""
    chosen = scores.seeds(arm) if seeds is None else seeds
    return common_grid([scores.costs(arm, seed, currency) for seed in chosen])


def shared_currencies(scores: Scores) -> list[str]:
    """Currencies that every done cell spent some of."""
    done = scores.study.done
    return [name for name in (*CURRENCIES, *MEASURED) if (done[f"spent/{name}"] > 0).all()]


def smallest_spend(scores: Scores, currency: str) -> float:
    """The least that any done cell spent: up to here every curve is known."""
    cells = [(arm, seed) for arm in scores.study.arms for seed in scores.seeds(arm)]
    return min(float(scores.costs(arm, seed, currency)[-1]) for arm, seed in cells)


def at_equal_amount(scores: Scores, arm: str, currency: str, amount: float) -> Floats:
    """(S, I) score of the arm once it has spent `amount`, interpolated on each seed's learning curve."""
    return curve_values(scores, arm, currency, np.array([amount]))[:, :, 0]


def area_estimate(scores: Scores, arm: str, currency: str) -> Estimate:
    """Mean score over the spend that all arms share: the area under the learning curve divided by its
    length.
    """
    seeds = scores.seeds(arm)
    limit = smallest_spend(scores, currency)
    grid = common_grid([scores.costs(arm, seed, currency) for seed in seeds], limit)
    values = curve_values(scores, arm, currency, grid, seeds)
    return scores.estimate(area_under_curve(grid, values))


def target_estimate(scores: Scores, arm: str, reference: str, currency: str) -> Estimate | None:
    """Spend at which the arm's mean curve first reaches the reference's final score.

    Arm and reference are resampled together, over the seeds that both have; a resample that never reaches its
    target counts as infinite. Because the first of several noisy points above the target counts, the estimate
    leans towards early.

    Returns:
        The estimate, infinite where the target is not reached; None without a common seed.
    """
    seeds = scores.seeds(arm, reference)
    if not seeds:
        return None
    grid = arm_grid(scores, arm, currency, seeds)
    own = curve_values(scores, arm, currency, grid, seeds)
    goal = scores.final(reference, scores.curve_metric, seeds)
    both = np.concatenate([own, goal[:, :, None]], axis=2)
    mean, draws = bootstrap_for(len(seeds), scores.families).draws(both)
    reached = cost_to_target(grid, mean[:-1], mean[-1])
    costs = cost_to_target(grid, draws[:, :-1], draws[:, -1])
    # Quantiles that lie between two resamples are no costs of either when one of them is infinite.
    low, high = np.quantile(costs, [0.025, 0.975], method="inverted_cdf")
    return Estimate(reached, low, high)
