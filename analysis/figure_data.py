"""A study's frames as the arrays that figures draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.comparisons import Scores
from analysis.curves import at_costs, common_grid
from analysis.resampling import bootstrap_for
from analysis.results import Study
from analysis.statistics import Floats, family_weights

GRID = 60  # costs at which a per-step quantity is drawn


@dataclass(frozen=True)
class Band:
    """Runs of one arm at common costs: cost (G,), runs (S, G), their mean and 95 % interval over seeds (G,).

    With fewer than three seeds the interval says nothing (`low` and `high` are NaN); draw the runs instead.
    """

    cost: Floats
    runs: Floats
    mean: Floats
    low: Floats
    high: Floats


def band(cost: Floats, runs: Floats) -> Band:
    """Mean and bootstrap interval over seeds of (S, G) curves."""
    mean = runs.mean(axis=0)
    if len(runs) < 3:
        nothing = np.full_like(mean, np.nan)
        return Band(cost, runs, mean, nothing, nothing)
    estimate = bootstrap_for(len(runs), ("all",)).estimate(runs[:, None, :], problems=False)
    return Band(cost, runs, mean, estimate.low, estimate.high)


def learning_curve(scores: Scores, arm: str) -> Band:
    """pass@1 of an arm over the primary currency: mean over families of all evaluated points."""
    weights, seeds = family_weights(scores.families), scores.seeds(arm)
    costs = [scores.costs(arm, seed, scores.study.currency) for seed in seeds]
    grid = common_grid(costs)
    runs = [
        at_costs(cost, scores.curve(arm, seed, "pass_at_1") @ weights, grid)
        for cost, seed in zip(costs, seeds, strict=True)
    ]
    return band(grid, np.stack(runs))


def gap_over_tries(scores: Scores, arm: str, tries: Sequence[int]) -> Band:
    """Final pass@k of an arm minus the reference's over the numbers of tries k: mean over families, paired by seed."""
    pair, weights = (arm, scores.study.reference), family_weights(scores.families)
    runs = np.stack([scores.paired(pair, f"pass_at_{k}") @ weights for k in tries], axis=1)
    return band(np.array(tries, dtype=float), runs)


def step_curve(study: Study, arm: str, key: str) -> Band | None:
    """A per-step metric of an arm over the primary currency; None where it was not recorded.

    Steps are averaged in `GRID` equal parts of the budget at most, since single steps are noisy.
    """
    if key not in study.steps:
        return None
    rows = study.steps.loc[study.steps["arm"] == arm, ["seed", study.currency, key]].dropna()
    per_seed = [mine for _, mine in rows.groupby("seed") if len(mine) > 1]
    if not per_seed:
        return None
    bins = max(2, min(GRID, *(len(mine) // 2 for mine in per_seed)))
    smooth = [_binned(mine[study.currency].to_numpy(float), mine[key].to_numpy(float), bins) for mine in per_seed]
    grid = common_grid([cost for cost, _ in smooth])
    return band(grid, np.stack([at_costs(cost, values, grid) for cost, values in smooth]))


def _binned(cost: Floats, values: Floats, bins: int) -> tuple[Floats, Floats]:
    parts = np.array_split(np.arange(len(cost)), min(bins, len(cost)))
    return np.array([cost[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def uneven_share(study: Study, cut: int = 1) -> pd.Series[float]:
    """Share of the steps, by arm, that gave their prompts different numbers of rollouts, by 2 and more.

    An allocator that reads histories is uniform until prompts come back.

    Args:
        cut: steps at the end of a run that are left out; the last is always cut to the budget, the one before often.
    """
    rows = study.allocation
    rows = rows[rows["step"] <= rows.groupby(["arm", "seed"])["step"].transform("max") - cut]
    if rows.empty:
        return pd.Series(dtype=float)
    widths = rows.groupby(["arm", "seed", "step"])["n"].agg(lambda n: n.max() - n.min())
    return (widths >= 2).astype(float).groupby("arm").mean()


def dynamic_arms(study: Study) -> list[str]:
    """Arms that gave the prompts of a step different numbers of rollouts in more than a tenth of the whole steps."""
    share = uneven_share(study, cut=2)
    return [arm for arm in study.arms if share.get(arm, 0.0) > 0.1]


def rollout_shares(study: Study, arm: str, bins: int = 24) -> tuple[Floats, Floats, Floats]:
    """How the rollouts per prompt of an arm are spread over its training.

    Returns:
        Edges of the costs, (B + 1,), whole numbers of rollouts, (N,), and the share of prompts, (N, B), each
        column of which adds up to 1.
    """
    rows = study.allocation[study.allocation["arm"] == arm]
    steps = study.steps[study.steps["arm"] == arm]
    keys = ["arm", "seed", "step"]
    rows = rows.merge(steps[[*keys, study.currency]], on=keys)
    bins = max(2, min(bins, int(steps.groupby("seed").size().min())))
    edges = np.linspace(0.0, float(rows[study.currency].max()), bins + 1)
    place = np.clip(np.searchsorted(edges, rows[study.currency].to_numpy(float), side="left") - 1, 0, bins - 1)
    values = np.arange(int(rows["n"].min()), int(rows["n"].max()) + 1)
    table = pd.crosstab(rows["n"], place, rows["prompts"], aggfunc="sum")
    table = table.reindex(index=values, columns=range(bins)).fillna(0.0)
    shares = table.to_numpy(float)
    total = shares.sum(axis=0)
    # A part in which no step ended looks like the last one before it in which one did, or the first of all.
    known = np.flatnonzero(total > 0)
    nearest = known[np.maximum(np.searchsorted(known, np.arange(bins), side="right") - 1, 0)]
    return edges, values.astype(float), (shares / np.where(total > 0, total, 1.0))[:, nearest]


def phase_seconds(study: Study) -> pd.DataFrame:
    """Mean device seconds of a run by arm (rows) and phase (columns), over done seeds."""
    columns = [name for name in study.done.columns if name.startswith("seconds/")]
    frame = study.done.groupby("arm")[columns].mean().fillna(0.0).reindex(study.arms)
    return frame.rename(columns=lambda name: name.removeprefix("seconds/"))
