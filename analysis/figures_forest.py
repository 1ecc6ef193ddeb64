"""Figures that compare arms by a number at the end: forest plots and bars, one row an arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparisons import Scores
from analysis.figure_data import phase_seconds
from analysis.formatting import interval, metric_name, points
from analysis.palette import PHASES, Style, styles
from analysis.plotting import (
    REFERENCE_GREY,
    amounts,
    beside,
    label_below,
    label_x,
    narrow,
    new_figure,
    part_of_rows,
    percent,
    point,
    rows,
)
from analysis.results import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.statistics import Estimate

_ROW = 0.21  # inches a row of a forest plot
_VARIANCE_STYLES = {
    "uniform": Style("#595959", "o", (0, ())),
    "variance": Style("#0072B2", "s", (0, ())),
    "standard_deviation": Style("#D55E00", "D", (0, ())),
}


def final_accuracy(scores: Scores) -> Figure | None:
    """Final pass@1 (the primary metric) of every arm with its two-level interval, the best on top."""
    study = scores.study
    found = {arm: scores.estimate(scores.final(arm, study.metric)) for arm in study.arms}
    figure = forest(study, found)
    axis = figure.axes[0]
    if study.reference in found:
        mean = float(found[study.reference].mean)
        axis.axvline(mean, color=REFERENCE_GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    label_x(figure, axis, f"final {metric_name(study.metric)}, %, mean over families and 95 % interval")
    return figure


def differences(scores: Scores) -> Figure | None:
    """Paired difference of every arm to the reference, with its interval; None without the reference."""
    study = scores.study
    others = [arm for arm in study.arms if arm != study.reference and study.reference in study.arms]
    found = {
        arm: scores.estimate(scores.paired((arm, study.reference), study.metric))
        for arm in others
        if scores.seeds(arm, study.reference)
    }
    if not found:
        return None
    figure = forest(study, found, sign=True)
    axis = figure.axes[0]
    axis.axvline(0, color="#444444", linewidth=0.9, zorder=1)
    label_x(figure, axis, f"{metric_name(study.metric)} minus {study.reference}, points, paired, 95 % interval")
    return figure


def forest(study: Study, found: Mapping[str, Estimate], *, sign: bool = False, digits: int = 1) -> Figure:
    """One row an arm, sorted by the mean, with the numbers written at the right edge."""
    looks = styles(study.plan["arms"])
    order = sorted(found, key=lambda arm: (-float(found[arm].mean), arm))
    order, high = part_of_rows(order, _ROW, 0.7)
    figure = new_figure(high * len(order) + 0.7)
    axis = figure.subplots()
    for row, arm in enumerate(order):
        mean, low, high = (float(x) for x in (found[arm].mean, found[arm].low, found[arm].high))
        point(axis, row, mean, (low, high), looks[arm])
        text = points(mean, digits=digits, sign=sign)
        text += "" if narrow() else f"  {interval(low, high, digits=digits, sign=sign)}"
        axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=7.5)
    rows(axis, order)
    for label, arm in zip(axis.get_yticklabels(), order, strict=True):
        label.set_fontweight("bold" if arm == study.reference else "normal")
    percent(axis.xaxis, bins=5 if narrow() else 8)
    return figure


def spend_by_phase(scores: Scores) -> Figure | None:
    """Device seconds of a run by phase, mean over seeds, one bar an arm in the study's order."""
    seconds = phase_seconds(scores.study)
    names = [str(name) for name in seconds]
    phases = [name for name in PHASES if name in names] + sorted(set(names) - set(PHASES))
    if not phases:
        return None
    longest = sum((seconds[name].to_numpy(float) for name in phases), np.zeros(len(seconds))).max()
    arms, high = part_of_rows(list(seconds.index), _ROW, 1.0)
    seconds = seconds.loc[arms]
    figure = new_figure(high * len(arms) + 1.0)
    axis = figure.subplots()
    left = np.zeros(len(seconds))
    for name in phases:
        width = seconds[name].to_numpy(float)
        colour = PHASES.get(name, PHASES["other"])
        axis.barh(range(len(seconds)), width, left=left, height=0.72, color=colour, label=name, linewidth=0)
        left = left + width
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:.3g} s", va="center", fontsize=7)
    rows(axis, list(seconds.index))
    axis.set_xlim(0, 1.09 * longest)
    amounts(axis.xaxis, bins=4 if narrow() else 7)
    label_x(figure, axis, "device seconds of a run, mean over seeds")
    columns = 4 if narrow() else len(phases)
    figure.legend(loc="outside upper center", ncols=columns, handlelength=1.0, columnspacing=1.2)
    return figure


def gradient_variance(record: Mapping[str, Any]) -> Figure | None:
    """Measured gradient variance of allocators at equal draws relative to uniform, a panel an advantage.

    Args:
        record: ``gradient_variance.json``: rows of allocator, advantage, ratio, low, high.
    """
    entries: Sequence[Mapping[str, Any]] = record.get("rows", [])
    advantages = list(dict.fromkeys(str(entry["advantage"]) for entry in entries))
    allocators = list(dict.fromkeys(str(entry["allocator"]) for entry in entries))
    if not entries:
        return None
    figure, axes = beside(len(advantages), 0.26 * len(allocators) + 0.95, share_y=True)
    spare = styles([name for name in allocators if name not in _VARIANCE_STYLES])
    for axis, advantage in zip(axes, advantages, strict=True):
        axis.axvline(1.0, color="#444444", linewidth=0.9, zorder=1)
        for entry in entries:
            if str(entry["advantage"]) == advantage:
                name = str(entry["allocator"])
                style = _VARIANCE_STYLES.get(name) or spare[name]
                ends = tuple(math.nan if entry.get(end) is None else float(entry[end]) for end in ("low", "high"))
                point(axis, allocators.index(name), float(entry["ratio"]), (ends[0], ends[1]), style)
        rows(axis, [name.replace("_", " ") for name in allocators])
        axis.set_title(f"advantage: {advantage.replace('_', ' ')}", loc="left")
    text = "trace of the gradient's covariance relative to uniform, 95 % interval"
    label_below(figure, text)
    return figure
