"""Tables of a sweep: default and tuned arms on fresh seeds, the settings found, and what tuning cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import (
    MISSING,
    amount,
    counted,
    currency_name,
    exact,
    interval,
    metric_name,
    p_value,
    plus_minus,
    points,
)
from analysis.statistics import Floats, holm
from analysis.sweep_data import SweepRecord, states
from analysis.table_scores import ARM, is_clear
from analysis.tables import Column, Table, Text
from benchmark.ledger import CURRENCIES
from benchmark.sweep_space import value_at
from benchmark.sweep_trial import DONE

SPENT = ("rollouts", "tokens_generated", "flops", "device_seconds")


def tuned_table(record: SweepRecord, scores: Scores) -> Table:
    """Every arm's default and tuned setting on the same fresh seeds, and what tuning it cost."""
    metric, present = scores.study.metric, set(scores.study.arms)
    tuned = {arm: record.name(arm, n) for arm in record.labels if (n := record.tuned(arm)) is not None}
    own = [(tuned[arm], arm) for arm in tuned if tuned[arm] != arm and {arm, tuned[arm]} <= present]
    best = tuned.get(record.config.reference)
    others = [(tuned[arm], best) for arm in tuned if best in present and tuned[arm] in present and tuned[arm] != best]
    found = [d for d in scores.differences([*own, *((a, str(b)) for a, b in others)], metric) if d.family == AVERAGE]
    adjusted = holm([d.p for d in found])
    pairs = {(d.arm, d.reference): (d, float(q)) for d, q in zip(found, adjusted, strict=True)}
    rows, data = [], []
    for arm in record.labels:
        name, row = tuned.get(arm, ""), [Text(arm)]
        figures: dict[str, Any] = {"arm": arm, "tuned_trial": record.tuned(arm)}
        for kind, setting in (("default", arm), ("tuned", name)):
            text, mean = _score(scores, setting, metric)
            row.append(Text(text))
            figures[kind] = mean
        for kind, pair in (("gain", (name, arm)), ("to_reference", (name, str(best)))):
            texts, numbers = _difference(pairs.get(pair), kind, same=pair[0] == pair[1] and name in present)
            row += texts
            figures |= numbers
        spent = record.spend[record.spend["arm"] == arm] if len(record.spend) else record.spend
        row += [Text(str(len(record.of(arm, DONE)))), Text(amount(float(spent["tokens_generated"].sum())))]
        figures |= {"trials": len(record.of(arm)), "tuning_tokens_generated": int(spent["tokens_generated"].sum())}
        rows.append(row)
        data.append(figures)
    seeds = counted(len(record.config.finalists.seeds), "fresh seed")
    reference = f"to {record.config.reference} tuned"
    columns = [ARM, Column("default"), Column("tuned"), Column("gain", "tuned minus default")]
    columns.append(Column("Holm p", "tuned minus default"))
    columns += [Column("difference", reference), Column("Holm p", reference)]
    columns += [Column("whole trials", "tuning"), Column("tokens", "tuning")]
    notes = [
        f"Percent {metric_name(metric)}, mean over families, on {seeds} that no trial has seen; ± half the 95 % "
        "two-level interval. Differences in percentage points, paired by seed and problem, with 95 % intervals; Holm "
        f"over the {counted(len(found), 'comparison')} of this table; bold: clear after it.",
        "Tuned: the setting with the best mean over the tuning seeds, fixed before the fresh seeds ran. An arm whose "
        "default was best is tuned to its default.",
        f"Every arm got {counted(record.config.trials, 'trial')}; tokens: generated in training, all trials.",
    ]
    return Table("tuned", "Default and tuned arms on fresh seeds", columns, rows, pd.DataFrame(data), notes)


def _score(scores: Scores, name: str, metric: str) -> tuple[str, float]:
    if name not in scores.study.arms:
        return MISSING, math.nan
    found = scores.estimate(scores.final(name, metric))
    return plus_minus(float(found.mean), float(found.low), float(found.high)), float(found.mean)


def _difference(
    found: tuple[Difference, float] | None, kind: str, *, same: bool
) -> tuple[list[Text], dict[str, float]]:
    if found is None:
        return [Text("same setting" if same else MISSING), Text("")], {}
    d, q = found
    text = f"{points(d.mean, sign=True)} {interval(d.low, d.high)}"
    numbers = {kind: d.mean, f"{kind}_low": d.low, f"{kind}_high": d.high, f"{kind}_p": d.p, f"{kind}_holm": q}
    return [Text(text, bold=is_clear(d, q)), Text(p_value(q))], numbers


def finalists_table(record: SweepRecord, scores: Scores) -> Table:
    """Every setting that ran on fresh seeds, with its mean in tuning beside it."""
    metric, rows, data = scores.study.metric, [], []
    for label in record.labels:
        numbers = [int(n) for n in record.of(label, DONE)["number"]]
        means = dict(zip(numbers, record.values(label, record.config.objective[0]).mean(axis=1), strict=True))
        for number in sorted({0, *numbers}, key=lambda n: (-means.get(n, math.inf) if n else -math.inf, n)):
            name = record.name(label, number)
            if name not in scores.study.arms:
                continue
            text, mean = _score(scores, name, metric)
            tuning = float(means.get(number, math.nan))
            rows.append([Text(name), Text(points(tuning)), Text(text)])
            data.append([label, number, tuning, mean])
    notes = ["Tuning: mean over the tuning seeds, by which settings were picked, so the best ones flatter themselves."]
    frame = pd.DataFrame(data, columns=["arm", "trial", "tuning_mean", "fresh_mean"])
    columns = [Column("setting", left=True), Column("tuning seeds"), Column("fresh seeds")]
    return Table("finalists", "Defaults and finalists", columns, rows, frame, notes)


def settings_table(record: SweepRecord) -> Table:
    """What was searched in each arm, its default, what was found, and which parameters mattered."""
    rows, data = [], []
    for label in record.labels:
        number, shares = record.tuned(label), record.importances(label)
        trials = record.of(label).set_index("number")["point"]
        run = record.sweep.run(label, label, None, record.config.seeds[0])
        for key, space in record.config.spaces(label).items():
            default = value_at(run, key)
            found = space.value(trials[number][key]) if number else default if number == 0 else None
            share = [float(shares[name][key]) if shares is not None else math.nan for name in _EVALUATORS]
            rows.append(
                [Text(label), Text(key), Text(_range(space)), Text(_value(default)), Text(_value(found))]
                + [Text(f"{100 * part:.0f}" if math.isfinite(part) else MISSING) for part in share]
            )
            data.append([label, key, _range(space), _value(default), _value(found), *share])
    columns = [ARM, *(Column(title, left=True) for title in ("parameter", "searched", "default", "tuned"))]
    columns += [Column(f"{name}, %") for name in _EVALUATORS]
    notes = [
        "fANOVA: share of the objective's variance over the whole range; PED-ANOVA: share in which the best tenth of "
        "the trials differs from the rest. With few trials and noisy objectives both are rough.",
        "none: the method derives the value from the batch.",
    ]
    frame = pd.DataFrame(data, columns=["arm", "parameter", "searched", "default", "tuned", "fanova", "ped_anova"])
    return Table("settings", "What was searched and found", columns, rows, frame, notes)


_EVALUATORS = ("fANOVA", "PED-ANOVA")


def _range(space: Any) -> str:
    if space.type == "categorical":
        return ", ".join(map(str, space.points))
    return f"{space.low:g} to {space.high:g}" + (", log" if space.log else "")


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tuning_table(record: SweepRecord) -> Table:
    """How the trials of each arm ended, how far they spread, and what they cost."""
    goal, rows, data = record.config.objective[0], [], []
    for label in record.labels:
        values = record.values(label, goal)
        means = values.mean(axis=1)
        default = means[0] if 0 in set(record.of(label, DONE)["number"]) else math.nan
        best = float(means.max()) if len(means) else math.nan
        noise, spread = trial_noise(values), float(means.std(ddof=1)) if len(means) > 1 else math.nan
        spent = record.spend[record.spend["arm"] == label] if len(record.spend) else record.spend
        totals = {name: float(spent[name].sum()) for name in (*CURRENCIES, "device_seconds", "evaluation_tokens")}
        rows.append(
            [
                Text(label),
                Text(states(record, label)),
                *(Text(points(value)) for value in (default, best, spread, noise)),
                Text(exact(len(spent))),
                *(Text(amount(totals[name])) for name in SPENT),
            ]
        )
        data.append([label, len(record.of(label, DONE)), default, best, spread, noise, len(spent), *totals.values()])
    names = ["arm", "whole_trials", "default_mean", "best_mean", "spread", "noise", "runs", *totals]
    columns = [ARM, Column("trials", left=True), *map(Column, ("default", "best", "sd of trials", "noise of a trial"))]
    columns += [Column("runs", "spend"), *(Column(currency_name(name), "spend") for name in SPENT)]
    notes = [
        f"Percent {metric_name(goal)}, mean over the tuning seeds ({', '.join(map(str, record.config.seeds))}).",
        "Noise of a trial: standard error of a trial's mean over seeds, common seed effects removed. Where the sd of "
        "the trials is not well above it, the search saw little but noise.",
    ]
    return Table("tuning", "The search", columns, rows, pd.DataFrame(data, columns=names), notes)


def trial_noise(values: Floats) -> float:
    """Standard error of a trial's mean over seeds, from the residuals of a trials x seeds layout without interaction.

    Args:
        values: (T, S) objective of every trial and seed. NaN for one trial or one seed.
    """
    trials, seeds = values.shape
    if trials < 2 or seeds < 2:
        return math.nan
    rest = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float(np.sqrt((rest**2).sum() / ((trials - 1) * (seeds - 1)) / seeds))
