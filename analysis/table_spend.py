"""Tables of what arms spend and what they get for it: budgets, time, rollouts, cost to a target, rankings."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from analysis.comparisons import Scores
from analysis.formatting import MISSING, amount, currency_name, exact, metric_name, plus_minus, points
from analysis.results import MEASURED
from analysis.spending import area_estimate, at_equal_amount, shared_currencies, smallest_spend, target_estimate
from analysis.table_scores import ARM
from analysis.tables import Column, Table, Text
from benchmark.ledger import CURRENCIES, FATES, UNCHARGED_PHASES

NOT_REACHED = "not reached"


def spend_table(scores: Scores) -> Table:
    """Planned and spent budget of every arm, and its spend in every currency, mean over seeds."""
    study = scores.study
    grouped = study.done.groupby("arm")
    currencies = [name for name in (*CURRENCIES, *MEASURED) if study.done[f"spent/{name}"].notna().any()]
    apart = {"evaluation tokens": "evaluation_tokens"}
    if study.done["oracle/rollouts"].any():
        apart["oracle tokens"] = "oracle/tokens_generated"
    rows, data = [], []
    for arm in study.arms:
        cells = grouped.get_group(arm)
        planned, spent = float(cells["planned"].mean()), float(cells[f"spent/{study.currency}"].mean())
        overshoot = max((float(x) for x in cells["overshoot"]), key=abs)
        means = [float(cells[f"spent/{name}"].mean()) for name in currencies]
        means += [float(cells[column].astype(float).mean()) for column in apart.values()]
        rows.append([Text(text) for text in (arm, exact(planned), exact(spent), exact(overshoot), *map(amount, means))])
        data.append([arm, len(cells), planned, spent, overshoot, *means])
    names = ["arm", "seeds", "planned", "spent", "largest_overshoot", *currencies]
    names += [title.replace(" ", "_") for title in apart]
    titles = ["planned", "spent", "overshoot", *map(currency_name, currencies), *apart]
    notes = [
        f"Planned, spent and overshoot in {currency_name(study.currency)}; overshoot is the largest of any seed. "
        "Means over seeds. Everything drawn is charged, what was thrown away too; evaluation is not.",
    ]
    if "oracle tokens" in apart:
        notes.append(
            "Oracle tokens: what an arm was told for free. It bounds what a method could gain; it is no method."
        )
    return Table(
        "spend",
        "What a run of each arm spent",
        [ARM, *map(Column, titles)],
        rows,
        pd.DataFrame(data, columns=names),
        notes,
    )


def seconds_table(scores: Scores) -> Table:
    """Device seconds of every arm by phase, mean over seeds."""
    study = scores.study
    columns = [name for name in study.done.columns if name.startswith("seconds/")]
    order = ["decode", "verify", "forward", "backward", "optimiser", "other"]
    phases = [name.removeprefix("seconds/") for name in columns]
    trained = [p for p in order if p in phases] + sorted(set(phases) - set(order) - set(UNCHARGED_PHASES))
    phases = trained + [p for p in UNCHARGED_PHASES if p in phases]
    means = study.done.groupby("arm")[[f"seconds/{phase}" for phase in phases]].mean().fillna(0.0)
    means = means.rename(columns=lambda name: name.removeprefix("seconds/")).loc[study.arms]
    means.insert(len(trained), "training", means[trained].sum(axis=1))
    means["wall"] = study.done.groupby("arm")["wall_seconds"].mean()
    rows = [
        [Text(str(arm)), *(Text(f"{value:.1f}" if math.isfinite(value) else MISSING) for value in values)]
        for arm, values in zip(means.index, means.to_numpy(float), strict=True)
    ]
    notes = [
        "Seconds of a run, mean over seeds; training is the sum of the phases before it. On a CPU device seconds "
        "are CPU seconds of the process; wall seconds depend on what else the machine did."
    ]
    columns_shown = [ARM, *(Column(str(name)) for name in means.columns)]
    return Table("seconds", "Device seconds by phase", columns_shown, rows, means.reset_index(), notes)


def rollouts_table(scores: Scores) -> Table:
    """What became of the rollouts every arm drew, mean over seeds."""
    study = scores.study
    fates = [fate for fate in FATES if fate != "probed" or study.done["drawn/probed"].any()]
    means = study.done.groupby("arm")[[f"drawn/{fate}" for fate in fates]].mean().loc[study.arms]
    means = means.rename(columns=lambda name: name.removeprefix("drawn/"))
    means.insert(0, "drawn", means.sum(axis=1))
    rows = []
    for arm, values in zip(means.index, means.to_numpy(float), strict=True):
        shares = [Text(f"{exact(value)} ({points(value / values[0])} %)") for value in values[1:]]
        rows.append([Text(str(arm)), Text(exact(values[0])), *shares])
    notes = [
        "Drawn = trained + filtered (dropped by the method) + overflow (kept, but beyond the batch) + failed (cut "
        f"short by the end of the budget){' + probed (pre-sampling)' if 'probed' in fates else ''}. All are charged."
    ]
    titles = [Column(str(name)) for name in means.columns]
    return Table("rollouts", "What became of the rollouts", [ARM, *titles], rows, means.reset_index(), notes)


def cost_table(scores: Scores) -> Table:
    """Spend at which every arm reaches the reference's final score, and the area under its learning curve."""
    study, name = scores.study, metric_name(scores.curve_metric)
    budget = smallest_spend(scores, study.currency)
    rows, data = [], []
    for arm in study.arms:
        target = target_estimate(scores, arm, study.reference, study.currency)
        cost = [float("nan")] * 3 if target is None else [float(x) for x in (target.mean, target.low, target.high)]
        area = area_estimate(scores, arm, study.currency)
        heights = [float(x) for x in (area.mean, area.low, area.high)]
        rows.append(
            [
                Text(arm),
                Text(_cost(cost[0])),
                Text(f"[{_cost(cost[1])}, {_cost(cost[2])}]"),
                Text(f"{cost[0] / budget:.2f}×" if math.isfinite(cost[0]) else MISSING),
                Text(plus_minus(*heights)),
            ]
        )
        data.append([arm, *cost, cost[0] / budget, *heights])
    names = ["arm", "cost", "cost_low", "cost_high", "share_of_budget", "area", "area_low", "area_high"]
    notes = [
        f"Target: the final {name} of {study.reference}, read off the mean learning curves by linear interpolation; "
        "the first point above the target counts, which leans towards early. Intervals resample seeds and problems "
        "of arm and target together.",
        f"Area: mean {name} in percent over the spend that all arms share.",
    ]
    titles = [f"{currency_name(study.currency)} to target", "95 % interval", "of the budget", "area under curve"]
    return Table(
        "cost_to_target",
        f"Cost of {study.reference}'s final accuracy",
        [ARM, *map(Column, titles)],
        rows,
        # An empty cell would hide that the target was measured and missed; "inf" says so.
        pd.DataFrame(data, columns=names),
        notes,
    )


def _cost(value: float) -> str:
    return NOT_REACHED if value == math.inf else amount(value)


def ranking_table(scores: Scores) -> Table:
    """Score and rank of every arm at equal amounts of every currency, by interpolation of its learning
    curves.
    """
    study = scores.study
    currencies = shared_currencies(scores)
    rows: dict[str, list[Text]] = {arm: [Text(arm)] for arm in study.arms}
    data, columns = [], [ARM]
    for currency in currencies:
        limit = smallest_spend(scores, currency)
        values = {arm: at_equal_amount(scores, arm, currency, limit) for arm in study.arms}
        means = {arm: float(scores.estimate(found).mean) for arm, found in values.items()}
        columns.append(Column(f"at {amount(limit)}", currency_name(currency)))
        for arm in study.arms:
            rank = 1 + sum(mean > means[arm] for mean in means.values())
            rows[arm].append(Text(f"{points(means[arm])} ({rank})", bold=rank == 1))
            low, high, difference = _against(scores, values[arm], currency, limit, arm)
            data.append([arm, currency, limit, means[arm], rank, difference, low, high])
    names = ["arm", "currency", "amount", "mean", "rank", "difference", "low", "high"]
    notes = [
        f"{metric_name(scores.curve_metric)} in percent (rank) once each arm has spent the amount above the column: "
        "the smallest total that any run spent in that currency. The CSV file has paired differences to "
        f"{study.reference} with intervals.",
    ]
    if set(currencies) & set(MEASURED):
        notes.append("Seconds are measured, on whatever machine each run had.")
    title = "Ranking at equal amounts of other currencies"
    frame = pd.DataFrame(data, columns=names)
    return Table("ranking_by_currency", title, columns, list(rows.values()), frame, notes)


def _against(
    scores: Scores, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], currency: str, limit: float, arm: str
) -> tuple[float, float, float]:
    """Interval and mean of the paired difference to the reference at `limit`."""
    shared = scores.seeds(arm, scores.study.reference)
    if not shared:
        return math.nan, math.nan, math.nan
    mine = values[[scores.seeds(arm).index(seed) for seed in shared]]
    reference = scores.study.reference
    other = at_equal_amount(scores, reference, currency, limit)
    other = other[[scores.seeds(reference).index(seed) for seed in shared]]
    found = scores.estimate(mine - other)
    return float(found.low), float(found.high), float(found.mean)
