"""Tables of what arms achieve: scores, paired differences to the reference, aggregates, claims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from analysis.claims import Answer
from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import counted, currency_name, exact, interval, metric_name, p_value, plus_minus, points
from analysis.statistics import Floats, detectable_shift, holm, improvement_estimate, iqm_estimate
from analysis.tables import TIED, Column, Table, Text

ARM = Column("arm", left=True)
MOST_SEEDS = 200
"""Beyond these, more seeds are no answer."""


def main_table(scores: Scores) -> Table:
    """Final score of every arm: average and families, pass@k for every k."""
    study = scores.study
    cells = [(group, metric) for group in scores.groups for metric in study.metrics]
    texts: dict[str, list[Text]] = {arm: [Text(arm)] for arm in study.arms}
    data = []
    for group, metric in cells:
        best, tied = scores.best_and_tied(metric, group)
        for arm in study.arms:
            values = scores.final(arm, metric)
            found = scores.estimate(values, group)
            mean = float(found.mean)
            low, high = (float(np.clip(end, 0, 1)) for end in (found.low, found.high))
            texts[arm].append(Text(plus_minus(mean, low, high), bold=arm == best, tied=arm in tied))
            data.append([arm, group, metric, len(values), mean, low, high, arm == best, arm in tied])
    names = ["arm", "family", "metric", "seeds", "mean", "low", "high", "best", "tied_with_best"]
    notes = [
        f"Percent, mean over {_seeds_text(scores)} and {_items_text(scores)}, final evaluation with "
        f"{counted(study.samples, 'sample')} a problem; ± half the 95 % two-level interval (training seeds and "
        "problems).",
        "The interval of one arm holds the choice of problems, which all arms share: compare arms by their paired "
        "differences.",
        f"Bold: highest. {TIED}: the paired difference to the highest has 0 in its 95 % interval.",
    ]
    return Table(
        "main_table",
        f"Final accuracy at {_budget_text(scores)} a run",
        [ARM, *(Column(metric_name(metric), group) for group, metric in cells)],
        list(texts.values()),
        pd.DataFrame(data, columns=names),
        notes,
    )


def differences_table(scores: Scores, differences: Sequence[Difference]) -> Table:
    """Paired difference of every arm to the reference in the primary metric, averaged over families.

    Args:
        differences: of the primary metric; those of single families are left out.
    """
    study, name = scores.study, metric_name(scores.study.metric)
    shown = [difference for difference in differences if difference.family == AVERAGE]
    adjusted = holm([difference.p for difference in shown])
    data = _frame(shown, adjusted)
    data["detectable"] = [difference.detectable() for difference in shown]
    data["detectable_holm"] = [difference.detectable(len(shown)) for difference in shown]
    rows = [
        [
            Text(d.arm),
            Text(points(d.mean, sign=True), bold=is_clear(d, q)),
            Text(interval(d.low, d.high)),
            Text(p_value(d.p)),
            Text(p_value(q)),
            Text(points(d.seed_sd)),
            Text(points(d.detectable())),
            Text(str(d.seeds)),
        ]
        for d, q in zip(shown, adjusted, strict=True)
    ]
    titles = ["difference", "95 % interval", "p", "Holm p", "seed sd", "detectable", "seeds"]
    notes = [
        f"Percentage points of {name}, mean over families, paired by seed and problem; two-level 95 % interval.",
        f"p: studentised label swaps; Holm over the {counted(len(shown), 'cell')} of this table. Bold: the interval "
        "excludes 0 and Holm p < 0.05.",
        detectable_sentence(shown),
    ]
    title = f"Difference to {study.reference} in {name}"
    return Table("differences", title, [ARM, *map(Column, titles)], rows, data, notes)


def is_clear(difference: Difference, adjusted: float) -> bool:
    """Whether the interval excludes 0 and the adjusted p is below .05; never with one seed, which may be luck."""
    return difference.seeds > 1 and adjusted < 0.05 and not difference.low <= 0 <= difference.high


def detectable_sentence(differences: Sequence[Difference]) -> str:
    """The smallest true difference that the study could have found."""
    known = [d for d in differences if math.isfinite(d.detectable())]
    if not known:
        return "What difference was detectable is not known: there is one seed, or no two runs differ."
    one = np.array([d.detectable() for d in known])
    all_ = np.array([d.detectable(len(known)) for d in known])
    seeds = sorted({d.seeds for d in known})
    needed = seeds_for(0.01, known) or f"more than {MOST_SEEDS}"
    return (
        f"Minimum detectable effect (80 % power, two-sided .05) with {_range(seeds)} seeds: "
        f"{points(float(np.median(one)))} points (median over arms; {points(float(one.min()))} to "
        f"{points(float(one.max()))}), and {points(float(np.median(all_)))} where one comparison has to survive "
        f"Holm's correction for {len(known)}. A difference of 1 point would take about {needed} seeds."
    )


def seeds_for(effect: float, differences: Sequence[Difference]) -> int | None:
    """Seeds at which the median arm's detectable effect is `effect`; None where `MOST_SEEDS` do not get there."""
    for seeds in range(2, MOST_SEEDS + 1):
        errors = []
        for d in differences:
            seed_part = d.seed_sd**2 / d.seeds
            items = max(d.error**2 - seed_part, 0.0)
            errors.append(np.sqrt(d.seed_sd**2 / seeds + items) * detectable_shift(seeds))
        if float(np.median(errors)) <= effect:
            return seeds
    return None


def family_table(scores: Scores, differences: Sequence[Difference]) -> Table:
    """Paired differences to the reference of every arm, group and metric, Holm over all of them."""
    adjusted = holm([difference.p for difference in differences])
    groups = [(group, metric) for group in scores.groups for metric in scores.study.metrics]
    rows: dict[str, list[Text]] = {}
    for group, metric in groups:
        for d, q in zip(differences, adjusted, strict=True):
            if (d.family, d.metric) == (group, metric):
                text = f"{points(d.mean, sign=True)} {interval(d.low, d.high)}"
                rows.setdefault(d.arm, [Text(d.arm)]).append(Text(text, bold=is_clear(d, q)))
    notes = [
        "Percentage points with two-level 95 % intervals, paired by seed and problem.",
        "Bold: the interval excludes 0 and p < 0.05 after Holm over the "
        f"{counted(len(differences), 'cell')} of this table.",
    ]
    return Table(
        "differences_by_family",
        f"Difference to {scores.study.reference} by family and metric",
        [ARM, *(Column(metric_name(metric), group) for group, metric in groups)],
        list(rows.values()),
        _frame(differences, adjusted),
        notes,
    )


def aggregates_table(scores: Scores) -> Table:
    """Aggregates over runs and families that do not hang on single values."""
    study, name = scores.study, metric_name(scores.study.metric)
    rows, data = [], []
    for arm in study.arms:
        middle = iqm_estimate(scores.family_scores(arm, study.metric))
        numbers = [float(x) for x in (middle.mean, middle.low, middle.high)]
        texts = [Text(arm), Text(f"{points(numbers[0])} {interval(*numbers[1:], sign=False)}")]
        shared = scores.seeds(arm, study.reference) if arm != study.reference else []
        if shared:
            own, other = (scores.family_scores(x, study.metric, shared) for x in (arm, study.reference))
            better = improvement_estimate(own, other)
            chances = [float(x) for x in (better.mean, better.low, better.high)]
            texts.append(Text(f"{points(chances[0], digits=0)} {interval(*chances[1:], digits=0, sign=False)}"))
        else:
            chances = [float("nan")] * 3
            texts.append(Text(""))
        rows.append(texts)
        data.append([arm, *numbers, *chances])
    names = ["arm", "iqm", "iqm_low", "iqm_high", "improvement", "improvement_low", "improvement_high"]
    notes = [
        f"Percent. IQM: interquartile mean of {name} over runs and families. P(better): chance that a run of the "
        f"arm beats a run of {study.reference} on a random family (Mann-Whitney, ties half).",
        "Plain percentile intervals over seeds, which are narrow with few of them.",
    ]
    return Table(
        "aggregates",
        f"Robust aggregates of {name}",
        [ARM, Column("IQM"), Column(f"P(better than {study.reference})")],
        rows,
        pd.DataFrame(data, columns=names),
        notes,
    )


def claims_table(answers: Sequence[Answer]) -> Table:
    """Every claim of the plan with its answer."""
    rows, data = [], []
    for answer in answers:
        d = answer.difference
        numbers = [float("nan")] * 4 if d is None else [d.mean, d.low, d.high, d.p]
        rows.append(
            [
                Text(answer.text),
                Text(answer.verdict, bold=True),
                Text(points(numbers[0], sign=True)),
                Text(interval(*numbers[1:3])),
                Text(points(answer.min_effect)),
                Text(p_value(answer.holm)),
            ]
        )
        head = [answer.id, answer.arm, answer.reference, answer.metric, answer.min_effect, answer.verdict]
        data.append([*head, *numbers, answer.holm])
    names = ["claim", "arm", "reference", "metric", "min_effect", "verdict"]
    columns = [Column("claim", left=True), Column("answer", left=True)]
    titles = ["difference", "95 % interval", "has to exceed", "Holm p"]
    return Table(
        "claims",
        "The claims that were stated before any run",
        [*columns, *map(Column, titles)],
        rows,
        pd.DataFrame(data, columns=[*names, "mean", "low", "high", "p", "p_holm"]),
        [f"Percentage points; Holm over {counted(len(answers), 'claim')}."],
    )


def _frame(differences: Sequence[Difference], adjusted: Floats) -> pd.DataFrame:
    frame = pd.DataFrame([asdict(difference) for difference in differences])
    frame.insert(list(frame.columns).index("p") + 1, "p_holm", adjusted)
    return frame


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _seeds_text(scores: Scores) -> str:
    counts = [len(scores.seeds(arm)) for arm in scores.study.arms]
    return f"{_range(counts)} seed" + ("s" if max(counts) > 1 else "")


def _items_text(scores: Scores) -> str:
    families = counted(len(scores.study.families), "family", "families, equal weight")
    return f"{counted(len(scores.items), 'problem')} ({families})"


def _budget_text(scores: Scores) -> str:
    done = scores.study.done
    return f"{exact(float(done['planned'].iloc[0]))} {currency_name(str(done['planned_currency'].iloc[0]))}"
