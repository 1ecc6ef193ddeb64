"""Figures that papers of the field show beside a table: profiles, difficulty, improvement, Pareto front, histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparisons import Scores
from analysis.figures_forest import forest
from analysis.formatting import currency_name, metric_name, points
from analysis.palette import styles
from analysis.plotting import (
    amounts,
    beside,
    compact_log,
    label_below,
    label_x,
    legend_right,
    line,
    narrow,
    new_figure,
    percent,
)
from analysis.results import Study
from analysis.statistics import Floats, family_weights, improvement_estimate
from analysis.table_difficulty import by_difficulty
from benchmark.jsonl import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HISTOGRAMS = (
    ("policy/entropy_nats", "entropy, nats", False),
    ("policy/ratio_max", "largest ratio", True),
    ("policy/kl_old_nats", "KL(old, new), nats", True),
)
"""Per-step quantities: key, label, whether the axis is logarithmic."""
FLOOR = 1e-3
"""Nats below which a token counts as certain."""


def difficulty(scores: Scores) -> Figure | None:
    """Final pass@1 by success before training: the reference's level, and each arm's paired difference to it.

    A bold number has an interval without 0 (seeds and problems of the bin; not corrected for the many numbers).
    """
    study = scores.study
    if study.reference not in study.arms:
        return None
    cells = list(by_difficulty(scores))
    arms, heads = list(dict.fromkeys(cell.arm for cell in cells)), [c for c in cells if c.arm == study.reference]
    figure = new_figure(0.2 * len(arms) + 0.75)
    axis: Axes = figure.subplots()
    table = np.full((len(arms), len(heads)), np.nan)
    size = 6.0 if narrow() else 7.5
    for place, cell in enumerate(cells):
        row, column = divmod(place, len(heads))
        mean = float(cell.found.mean)
        look: dict[str, Any] = {"weight": "bold" if cell.clear else "normal"}
        if row == 0:
            look = {"color": "#444444", "style": "italic"}
        else:
            table[row, column] = mean
        text = points(mean, sign=True) if row else f"{100 * mean:.1f} %"
        axis.text(column, row, text, ha="center", va="center", fontsize=size, **look)
    reach = float(np.nanmax(np.abs(table), initial=0.01))
    # Light at both ends, so that black text stays readable; the sign is in the text, for grey print.
    axis.imshow(table, cmap="PuOr", vmin=-2.2 * reach, vmax=2.2 * reach, aspect="auto")
    axis.set_xticks(range(len(heads)), [f"{head.name}\nn = {head.problems}" for head in heads])
    axis.set_yticks(range(len(arms)), arms)
    axis.tick_params(length=0, labelsize=size)
    axis.grid(visible=False)
    for side in axis.spines.values():
        side.set_visible(False)
    label_x(figure, axis, f"success before training, %; below {study.reference}: difference to it, points")
    return figure


def profile(scores: Scores, arm: str, thresholds: Floats) -> Floats:
    """Share of runs and problems whose final pass@1 is at least each threshold, families weighted equally; (T,)."""
    final = scores.final(arm, "pass_at_1")
    reached = (final[None] >= thresholds[:, None, None] - 1e-9).mean(axis=1)
    return np.asarray(reached @ family_weights(scores.families), dtype=np.float64)


def performance_profiles(scores: Scores) -> Figure | None:
    """Share of runs and problems at or above a score, over the score; on the right the difference to the reference."""
    study, looks = scores.study, styles(scores.study.plan["arms"])
    thresholds = np.linspace(1 / study.samples, 1, min(study.samples, 64))
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


def pareto(scores: Scores) -> Figure | None:
    """Final accuracy over what a run cost in currencies other than the budget's; the line is the Pareto front.

    Bars are 95 % intervals over seeds.
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
        for arm, x, y in zip(study.arms, cost, heights, strict=True):
            style = looks[arm]
            axis.plot(
                [x, x], [float(found[arm].low), float(found[arm].high)], color=style.colour, linewidth=0.8, alpha=0.6
            )
            size = 9.0 if style.marker == "*" else 5.5  # a star fills a third of its square
            axis.plot(x, y, style.marker, color=style.colour, markersize=size, markeredgecolor="white", label=arm)
        axis.set_xlabel(f"{currency_name(str(currency).removeprefix('spent/'))} of a run,\nmean over seeds")
        # Costs that are all but equal stay beside each other.
        middle, reach = (max(cost) + min(cost)) / 2, max((max(cost) - min(cost)) * 0.55, 0.05 * max(cost))
        axis.set_xlim(middle - reach, middle + reach)
        amounts(axis.xaxis)
        percent(axis.yaxis)
    for axis in axes if narrow() else axes[:1]:
        axis.set_ylabel(f"final {metric_name(study.metric)}, %")
    legend_right(figure, axes[-1])
    return figure


def step_histograms(scores: Scores) -> Figure | None:
    """How entropy, the largest ratio and the KL estimate of a step are spread over the steps of each arm.

    One row an arm: darker is a larger share of its steps, all seeds together; the line is the median.
    """
    study = scores.study
    kept = [entry for entry in HISTOGRAMS if entry[0] in study.steps and study.steps[entry[0]].notna().any()]
    if not kept:
        return None
    steps = {arm: study.steps[study.steps["arm"] == arm] for arm in study.arms}
    return _histograms(
        [
            (label, {arm: own[key].dropna().to_numpy(float) for arm, own in steps.items()}, logarithmic)
            for key, label, logarithmic in kept
        ],
        "steps",
    )


def traced_tokens(study: Study, channel: str) -> dict[str, dict[str, Floats]]:
    """A channel of every traced token at the first and at the last traced update, (T,) by moment and arm.

    All runs of an arm together; without traces there is no moment.

    Args:
        channel: ``entropy`` in nats, or ``ratio``, pi / pi_old as the update met it.
    """
    found: dict[str, dict[str, list[float]]] = {"first": {}, "last": {}}
    for cell in study.done.to_dict("records"):
        rows = read_rows(study.folder / str(cell["dir"]) / "traces.jsonl")[0]
        rows = [row for row in rows if row["phase"] == "training"]
        steps = [row["step"] for row in rows]
        for row in rows:
            tokens = [value for rollout in row["rollouts"] for value in rollout.get(channel, ()) if value is not None]
            for moment, step in (("first", min(steps)), ("last", max(steps))):
                if row["step"] == step and tokens:
                    found[moment].setdefault(str(cell["arm"]), []).extend(tokens)
    return {moment: {arm: np.array(v) for arm, v in arms.items()} for moment, arms in found.items() if arms}


def token_entropy(scores: Scores) -> Figure | None:
    """How the policy's entropy is spread over tokens at the first and the last update of each arm.

    Tokens of the traced rollouts, all seeds together; the first cell holds those below `FLOOR` nats.
    """
    return _tokens(scores, "entropy", "entropy of a token, nats", FLOOR)


def token_ratio(scores: Scores) -> Figure | None:
    """How the ratio pi / pi_old is spread over tokens at the first and the last update of each arm.

    Tokens of the traced rollouts, all seeds together, as their first update in the step met them: those in the step's
    first minibatch have ratio 1.
    """
    return _tokens(scores, "ratio", "ratio of a token, pi / pi_old")


def _tokens(scores: Scores, channel: str, label: str, floor: float | None = None) -> Figure | None:
    found = traced_tokens(scores.study, channel)
    if not found:
        return None
    least = -np.inf if floor is None else floor
    nothing = np.array([])
    samples = {
        moment: {arm: arms.get(arm, nothing).clip(min=least) for arm in scores.study.arms}
        for moment, arms in found.items()
    }
    panels = [(f"{moment} update", sample, floor is not None) for moment, sample in samples.items()]
    figure = _histograms(panels, "tokens")
    label_below(figure, label)
    return figure


def _histograms(panels: Sequence[tuple[str, Mapping[str, Floats], bool]], what: str) -> Figure:
    """Panels of (title, sample by arm, whether the axis is logarithmic), with one scale of shares of `what`."""
    arms = list(panels[0][1])
    figure, axes = beside(len(panels), 0.17 * len(arms) + 0.75, share_x=False, share_y=True)
    meshes = []
    for axis, (title, values, logarithmic) in zip(axes, panels, strict=True):
        meshes.append(_rows_of_histograms(axis, list(values.values()), logarithmic))
        axis.set_title(title, loc="left")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.tick_params(labelsize=6.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False)
    bar = figure.colorbar(meshes[0], ax=axes, shrink=0.9, aspect=22, pad=0.02)
    percent(bar.ax.yaxis)
    bar.set_label(f"share of {what}, %")
    bar.outline.set_visible(False)
    return figure


def _rows_of_histograms(axis: Axes, rows: Sequence[Floats], logarithmic: bool, bins: int = 32) -> Any:
    """One row of cells a sample; the axis goes from the 2 % to the 98 % quantile, beyond which the end cells count.

    Else one extreme value would take most of it.
    """
    everything = np.concatenate(rows)
    low, high = (float(x) for x in np.quantile(everything, (0.02, 0.98)))
    high = high if high > low else low + 1.0
    edges = np.geomspace(low, high, bins + 1) if logarithmic and low > 0 else np.linspace(low, high, bins + 1)
    shares = np.stack([np.histogram(row.clip(low, high), edges)[0] / max(len(row), 1) for row in rows])
    heights = np.arange(len(rows) + 1) - 0.5
    mesh = axis.pcolormesh(edges, heights, shares, cmap="Greys", vmin=0, vmax=0.35, rasterized=True)
    for place, row in enumerate(rows):
        if len(row):
            middle = float(np.median(row.clip(low, high)))
            axis.plot([middle, middle], [place - 0.42, place + 0.42], color="#D55E00", linewidth=1.6)
    if logarithmic and low > 0:
        axis.set_xscale("log")
        compact_log(axis.xaxis, decades=high > 100 * low)
    return mesh
