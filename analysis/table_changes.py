"""The table of arms by what their methods change: which kind of change helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.formatting import MISSING, counted, interval, metric_name, p_value, points
from analysis.statistics import holm
from analysis.table_scores import ARM, is_clear
from analysis.tables import TIED, Column, Table, Text

KINDS = {
    "allocation": "rollout allocation",
    "selection": "prompt or group selection",
    "advantage": "advantage",
    "token": "token weight",
    "loss": "trust region or loss",
    "baseline": "baseline or optimiser",
}
"""Kinds of change, in the order of a training step, and what a table calls them."""
NONE = "none"


def kind_of(changes: Sequence[str]) -> str:
    """The kind that a method is grouped under: the first of its changes, which is its main one."""
    first = changes[0] if changes else NONE
    return "baseline" if first == "optimiser" else first


def changes_table(scores: Scores, differences: Sequence[Difference]) -> Table | None:
    """Arms grouped by what their methods change, with their paired difference to the reference, best first in a group.

    Args:
        differences: of the primary metric; those of single families are left out.

    Returns:
        None where the plan does not say what its methods change.
    """
    study = scores.study
    changes = {str(arm): list(found) for arm, found in (study.plan.get("changes") or {}).items()}
    if not set(study.arms) <= set(changes):
        return None
    shown = [d for d in differences if d.family == AVERAGE]
    found = {d.arm: (d, float(q)) for d, q in zip(shown, holm([d.p for d in shown]), strict=True)}
    best, tied = scores.best_and_tied(study.metric, AVERAGE)
    means = {arm: float(scores.estimate(scores.final(arm, study.metric)).mean) for arm in study.arms}
    order = [*KINDS, NONE]
    arms = sorted(study.arms, key=lambda arm: (order.index(kind_of(changes[arm])), -means[arm]))
    rows, data = [], []
    for arm in arms:
        kind, others = kind_of(changes[arm]), changes[arm][1:]
        d, adjusted = found.get(arm, (None, float("nan")))
        low, mean, high = (d.low, d.mean, d.high) if d else (float("nan"),) * 3
        rows.append(
            [
                Text(arm),
                Text(KINDS.get(kind, NONE)),
                Text(", ".join(others) or MISSING),
                Text(points(means[arm]), bold=arm == best, tied=arm in tied),
                Text(points(mean, sign=True), bold=d is not None and is_clear(d, adjusted)),
                Text(interval(low, high)),
                Text(p_value(adjusted)),
            ]
        )
        data.append([arm, kind, "+".join(changes[arm]), means[arm], mean, low, high, adjusted])
    names = ["arm", "kind", "changes", "mean", "difference", "low", "high", "p_holm"]
    frame = pd.DataFrame(data, columns=names)
    notes = [
        f"{metric_name(study.metric)} in percent and paired difference to {study.reference} in points with its "
        f"two-level 95 % interval; Holm over {counted(len(shown), 'arm')}. An arm stands under its main change.",
        f"Bold score: highest; {TIED}: tied with it. Bold difference: the interval excludes 0 and Holm p < 0.05.",
        *_kind_sentences(frame, shown, study.reference),
    ]
    titles = [metric_name(study.metric), "difference", "95 % interval", "Holm p"]
    columns = [ARM, Column("main change", left=True), Column("also changes", left=True), *map(Column, titles)]
    return Table("by_change", "Arms by what they change", columns, rows, frame, notes)


def _kind_sentences(frame: pd.DataFrame, shown: Sequence[Difference], reference: str) -> list[str]:
    """How many arms of every kind are clearly above and below the reference, and their median difference."""
    clear = {d.arm: np.sign(d.mean) for d, q in zip(shown, holm([d.p for d in shown]), strict=True) if is_clear(d, q)}
    sentences = []
    for kind, words in KINDS.items():
        arms = frame[(frame["kind"] == kind) & frame["difference"].notna()]
        if not len(arms):
            continue
        signs = [clear.get(arm, 0) for arm in arms["arm"]]
        median = points(float(arms["difference"].median()), sign=True)
        sentences.append(f"{words}: {signs.count(1)} above, {signs.count(-1)} below, of {len(arms)}, median {median}")
    return [f"Clearly above and below {reference}, by kind: {'; '.join(sentences)}."] if sentences else []
