"""Figures that papers of the field show beside a table: profiles, difficulty, improvement, Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparisons import Scores
from analysis.figure_data import Band, band
from analysis.figures_curves import difference_panels
from analysis.figures_forest import forest
from analysis.formatting import currency_name, metric_name, points
from analysis.palette import FILLS, styles
from analysis.plotting import (
    CROWDED,
    amounts,
    beside,
    label_below,
    label_x,
    legend_right,
    line,
    narrow,
    new_figure,
    part_of_rows,
    percent,
)
from analysis.statistics import Floats, family_weights, improvement_estimate
from analysis.table_difficulty import by_difficulty

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
LEAST_REACH = 0.1
"""Difference that has the strongest colour of the difficulty figure, unless more than a few are larger."""


def difficulty(scores: Scores) -> Figure | None:
    """Final pass@1 by success before training: the reference's level, and each arm's paired difference to it.

    A bold number has an interval without 0 (seeds and problems of the bin; not corrected for the many numbers).
    """
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    study = scores.study
    if study.reference not in study.arms:
        return None
    cells = list(by_difficulty(scores))
    heads = [c for c in cells if c.arm == study.reference]
    arms, high = part_of_rows(list(dict.fromkeys(cell.arm for cell in cells)), 0.2, 0.75)
    figure = new_figure(high * len(arms) + 0.75)
    axis: Axes = figure.subplots()
    table = np.full((len(arms), len(heads)), np.nan)
    size = 6.0 if narrow() else 7.5
    for place, cell in enumerate([cell for cell in cells if cell.arm in arms]):
        row, column = divmod(place, len(heads))
        mean = float(cell.found.mean)
        look: dict[str, Any] = {"weight": "bold" if cell.clear else "normal"}
        if cell.arm == study.reference:
            look = {"color": "#444444", "style": "italic"}
        else:
            table[row, column] = mean
        text = points(mean, sign=True) if cell.arm != study.reference else f"{100 * mean:.1f} %"
        axis.text(column, row, text, ha="center", va="center", fontsize=size, **look)
    # Of all arms, in every part. One arm far off does not pale the others, nor do small differences look large.
    found = [abs(float(cell.found.mean)) for cell in cells if cell.arm != study.reference]
    reach = max(LEAST_REACH, float(np.quantile(found, 0.95)) if found else 0.0)
    # Light at both ends, so that black text stays readable; the sign is in the text, for grey print.
    colours = LinearSegmentedColormap.from_list("pale", colormaps["PuOr"](np.linspace(0.27, 0.73, 65)))
    image = axis.imshow(table, cmap=colours, vmin=-reach, vmax=reach, aspect="auto")
    bar = figure.colorbar(
        image, ax=axis, shrink=0.9, aspect=max(22, 5 * figure.get_figheight()), pad=0.02, extend="both"
    )
    percent(bar.ax.yaxis)
    bar.set_label("points", fontsize=size)
    bar.ax.tick_params(labelsize=size)
    bar.outline.set_visible(False)
    axis.set_xticks(range(len(heads)), [f"{head.name}\nn = {head.problems}" for head in heads])
    axis.set_yticks(range(len(arms)), arms)
    axis.tick_params(length=0, labelsize=size)
    axis.grid(visible=False)
    for side in axis.spines.values():
        side.set_visible(False)
    label_x(figure, axis, f"success before training, %; below {study.reference}: difference to it, points")
    return figure


def profile(scores: Scores, arm: str, thresholds: Floats, seeds: Sequence[int] | None = None) -> Floats:
    """Share of runs and problems whose final pass@1 is at least each threshold, families weighted equally; (T,).

    Args:
        seeds: runs that count; by default all.
    """
    final = scores.final(arm, "pass_at_1", seeds)
    reached = (final[None] >= thresholds[:, None, None] - 1e-9).mean(axis=1)
    return np.asarray(reached @ family_weights(scores.families), dtype=np.float64)


def profile_gap(scores: Scores, arm: str, thresholds: Floats) -> Band:
    """An arm's `profile` minus the reference's, by seed."""
    seeds = scores.seeds(arm, scores.study.reference)
    own, base = (
        [profile(scores, name, thresholds, [seed]) for seed in seeds] for name in (arm, scores.study.reference)
    )
    return band(thresholds, np.stack(own) - np.stack(base))


def performance_profiles(scores: Scores) -> Figure | None:
    """Share of runs and problems at or above a score, over the score; on the right the difference to the reference.

    Where there are too many arms for one panel: the difference alone, a panel an arm.
    """
    study, looks = scores.study, styles(scores.study.plan["arms"])
    thresholds = np.linspace(1 / study.samples, 1, min(study.samples, 64))
    if study.reference in study.arms and len(study.arms) > CROWDED:
        return _profile_panels(scores, thresholds)
    profiles = {arm: profile(scores, arm, thresholds) for arm in study.arms}
    base = profiles.get(study.reference)
    figure, axes = beside(1 if base is None else 2, 2.2 if narrow() else 3.3)
    for arm, shares in profiles.items():
        for axis, values in zip(axes, [shares] if base is None else [shares, shares - base], strict=True):
            line(axis, thresholds, values, looks[arm], arm, strong=arm in (study.reference, "dynamo"))
    axes[0].set_title("runs and problems at or above, %", loc="left")
    if base is not None:
        axes[1].set_title(f"difference to {study.reference}, points", loc="left")
    for axis in axes:
        percent(axis.yaxis)
    percent(axes[0].xaxis)
    for axis in axes[-1:] if narrow() else axes:
        axis.set_xlabel("final pass@1 of a problem, %")
    legend_right(figure, axes[-1])
    return figure


def _profile_panels(scores: Scores, thresholds: Floats) -> Figure:
    reference = scores.study.reference
    arms = [arm for arm in scores.study.arms if arm != reference and scores.seeds(arm, reference)]

    def finish(axis: Axes) -> None:
        percent(axis.yaxis, 4)
        percent(axis.xaxis, 3)

    figure = difference_panels(scores, {arm: profile_gap(scores, arm, thresholds) for arm in arms}, finish)
    label_below(figure, "final pass@1 of a problem, %")
    figure.supylabel(f"runs and problems at or above, minus {reference}, points", fontsize=8.5)
    return figure


def improvement(scores: Scores) -> Figure | None:
    """Probability that a run of an arm beats a run of the reference on a random family, with its interval."""
    study = scores.study
    found = {}
    for arm in study.arms:
        shared = scores.seeds(arm, study.reference) if study.reference in study.arms and arm != study.reference else []
        if shared:
            own, other = (scores.family_scores(x, study.metric, shared) for x in (arm, study.reference))
            found[arm] = improvement_estimate(own, other)
    if not found:
        return None
    figure = forest(study, found, digits=0)
    axis = figure.axes[0]
    axis.axvline(0.5, color="#444444", linewidth=0.9, zorder=1)
    axis.set_xlim(-0.02, 1.02)
    label_x(figure, axis, f"P(run beats a run of {study.reference}), {metric_name(study.metric)}, %")
    return figure


def front(cost: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Positions of the points that no other point beats in both, from the cheapest to the best."""
    chosen: list[int] = []
    for place in sorted(range(len(cost)), key=lambda i: (cost[i], -accuracy[i])):
        if not chosen or accuracy[place] > accuracy[chosen[-1]]:
            chosen.append(place)
    return chosen


def name_front(axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside the points of a front, (name, x, y) from the left and lowest, in steps that keep them apart.

    No point lies above and left of one on a front: there stands its name, or below where the axis begins.
    """
    low, high = axis.get_ylim()
    left, right = axis.get_xlim()
    step = 8.5 / 72 * axis.figure.dpi * (high - low) / axis.get_window_extent().height
    outer = [point for point in points if point[1] < left + 0.33 * (right - left)]
    look = {"arrowstyle": "-", "color": "#666666", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    level = np.inf
    for name, x, y in reversed(outer):
        level = min(y, level) - step
        place = (x + 0.03 * (right - left), level)
        axis.annotate(name, (x, y), place, va="center", fontsize=6.5, zorder=5, arrowprops=look | {"relpos": (0, 0.5)})
    level = -np.inf
    for name, x, y in points[len(outer) :]:
        level = max(y, level) + step
        place = (x - 0.12 * (x - left), level)
        axis.annotate(
            name, (x, y), place, ha="right", va="center", fontsize=6.5, zorder=5, arrowprops=look | {"relpos": (1, 0.5)}
        )
    axis.set_ylim(low, max(high, level + step))


def pareto(scores: Scores) -> Figure | None:
    """Final accuracy over what a run cost in currencies other than the budget's; the line is the Pareto front.

    Bars are 95 % intervals over seeds. Markers differ in form and filling; those on the front have their names as well.
    """
    study, looks = scores.study, styles(scores.study.plan["arms"])
    spent = study.done.groupby("arm")[["spent/flops", "spent/device_seconds"]].mean()
    currencies = [name for name in spent if spent[name].notna().all() and (spent[name] > 0).all()]
    if not currencies:
        return None
    # Over seeds only: all arms answer the same problems, so the luck of the problems moves them together.
    found = {arm: scores.estimate(scores.final(arm, study.metric), problems=False) for arm in study.arms}
    figure, axes = beside(len(currencies), 2.4 if narrow() else 3.3, share_x=False, share_y=True)
    for axis, currency in zip(axes, currencies, strict=True):
        cost = spent[currency].reindex(study.arms).tolist()
        heights = [float(found[arm].mean) for arm in study.arms]
        best = front(cost, heights)
        axis.step([cost[i] for i in best], [heights[i] for i in best], where="post", color="#9A9A9A", zorder=1)
        for place, (arm, x, y) in enumerate(zip(study.arms, cost, heights, strict=True)):
            style, layer = looks[arm], 4 if place in best else 2
            ends = [float(found[arm].low), float(found[arm].high)]
            axis.plot([x, x], ends, color=style.colour, linewidth=0.8, alpha=0.6, zorder=layer - 1)
            axis.plot(
                x,
                y,
                style.marker,
                color=style.colour,
                markersize=9.0 if style.marker == "*" else 5.5,  # a star fills a third of its square
                fillstyle=FILLS[style.dash],
                markerfacecoloralt="white",
                markeredgewidth=0.9,
                label=arm,
                zorder=layer,
            )
        axis.set_xlabel(f"{currency_name(str(currency).removeprefix('spent/'))} of a run,\nmean over seeds")
        # Costs that are all but equal stay beside each other.
        middle, reach = (max(cost) + min(cost)) / 2, max((max(cost) - min(cost)) * 0.55, 0.05 * max(cost))
        axis.set_xlim(middle - reach, middle + reach)
        amounts(axis.xaxis)
        percent(axis.yaxis)
        name_front(axis, [(study.arms[i], cost[i], heights[i]) for i in best])
    for axis in axes if narrow() else axes[:1]:
        axis.set_ylabel(f"final {metric_name(study.metric)}, %")
    legend_right(figure, axes[-1])
    return figure
