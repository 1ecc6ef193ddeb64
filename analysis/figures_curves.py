"""Figures of quantities that change over training, or over the number of tries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.comparisons import Scores
from analysis.figure_data import (
    Band,
    dynamic_arms,
    gap_over_tries,
    learning_curve,
    rollout_shares,
    step_curve,
)
from analysis.formatting import metric_name
from analysis.palette import Style, styles
from analysis.plotting import (
    CROWDED,
    REFERENCE_GREY,
    amounts,
    arm_title,
    beside,
    chunks_of_panels,
    compact_log,
    cost_label,
    label_below,
    legend_right,
    line,
    narrow,
    panel_grid,
    panels,
    part_of_each,
    part_of_panels,
    percent,
)
from analysis.statistics import Floats, family_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 4
FAR_OUT = 4.0  # times the usual arm's largest difference to the reference: beyond it an arm has its own scale
NO_ROLLOUT = 0.25  # on a scale of doublings, where 0 has no place: the lower end of its cells
OPTIMISATION = (("policy/entropy_nats", "entropy, nats"), ("optim/gradient_norm", "gradient norm"))


def _draw(axis: Axes, curve: Band, style: Style, *, label: str | None = None) -> None:
    """Mean and band of an arm; with fewer than three seeds every run as a thin line."""
    axis.plot(curve.cost, curve.mean, color=style.colour, linestyle=style.dash, label=label, zorder=3)
    if np.isfinite(curve.low).all():
        axis.fill_between(curve.cost, curve.low, curve.high, color=style.colour, alpha=0.18, linewidth=0)
    elif len(curve.runs) > 1:
        axis.plot(curve.cost, curve.runs.T, color=style.colour, linewidth=0.5, alpha=0.6)


def _limits(axis: Axes, curves: list[Band], floor: float | None = None) -> None:
    """Leave room for the runs; a wide band of few seeds must not flatten every curve."""
    low = min(float(curve.runs.min()) for curve in curves)
    high = max(float(curve.runs.max()) for curve in curves)
    margin = 0.12 * (high - low) or 0.05
    bottom = low - margin
    axis.set_ylim(bottom if floor is None else max(bottom, floor), high + margin)


def learning_curves(scores: Scores) -> Figure | None:
    """pass@1 over training spend, one panel an arm, the reference in grey behind each."""
    study = scores.study
    curves = {arm: learning_curve(scores, arm) for arm in study.arms}
    looks, reference = styles(study.plan["arms"]), curves.get(study.reference)
    arms = part_of_panels(study.arms)
    figure, axes = panels(len(arms), _COLUMNS, height=1.0 if narrow() else 1.35)
    for axis, arm in zip(axes, arms, strict=True):
        curve = curves[arm]
        if reference is not None and arm != study.reference:
            axis.plot(reference.cost, reference.mean, color=REFERENCE_GREY, linewidth=1.2, zorder=2)
        _draw(axis, curve, Style(looks[arm].colour, looks[arm].marker, (0, ())))
        arm_title(axis, arm, looks[arm].colour)
        axis.margins(x=0.02)
    _limits(axes[0], list(curves.values()), floor=0.0)
    percent(axes[0].yaxis)
    amounts(axes[0].xaxis, bins=3)
    label_below(figure, cost_label(study.currency))
    figure.supylabel("pass@1, %", fontsize=8.5)
    return figure


def entropy_and_gradient_norm(scores: Scores) -> Figure | None:
    """Policy entropy and gradient norm over training spend, all arms in one panel each.

    Where there are too many arms for that: a panel an arm, first of the entropy and then of the gradient norm.
    """
    study, looks = scores.study, styles(scores.study.plan["arms"])
    curves = {key: {arm: step_curve(study, arm, key) for arm in study.arms} for key, _ in OPTIMISATION}
    kept = [(key, label) for key, label in OPTIMISATION if any(curves[key].values())]
    if not kept:
        return None
    if len(study.arms) > CROWDED:
        return _optimisation_panels(scores, [(label, _drawn(curves[key])) for key, label in kept])
    figure, axes = beside(len(kept), 2.2 if narrow() else 3.3)
    for axis, (key, label) in zip(axes, kept, strict=True):
        drawn = []
        for arm in study.arms:
            curve = curves[key][arm]
            if curve is None:
                continue
            drawn.append(curve)
            line(axis, curve.cost, curve.mean, looks[arm], arm, strong=arm in (study.reference, "dynamo"))
        _positive_scale(axis, drawn)
        axis.set_title(label, loc="left")
        axis.margins(x=0.02)
        amounts(axis.xaxis)
    for axis in axes if not narrow() else axes[-1:]:
        axis.set_xlabel(cost_label(study.currency))
    legend_right(figure, axes[-1])
    return figure


def _drawn(curves: Mapping[str, Band | None]) -> dict[str, Band]:
    return {arm: curve for arm, curve in curves.items() if curve is not None}


def _optimisation_panels(scores: Scores, quantities: Sequence[tuple[str, dict[str, Band]]]) -> Figure:
    """A panel an arm and quantity, with one scale for a quantity and the reference in grey; a part shows one of them.

    A figure without parts has the panels of one quantity below those of the other.
    """
    looks, reference = styles(scores.study.plan["arms"]), scores.study.reference
    sheets = [(label, curves, arms) for label, curves in quantities for arms in chunks_of_panels(list(curves))]
    shown = part_of_each(sheets)
    columns, _ = panel_grid(max(len(arms) for _, _, arms in shown), _COLUMNS, 1.0)
    slots = [(label, curves, arm) for label, curves, arms in shown for arm in [*arms, *[""] * (-len(arms) % columns)]]
    figure, axes = panels(len(slots), columns, height=1.0, share_y=False)
    for place, (axis, (label, curves, arm)) in enumerate(zip(axes, slots, strict=True)):
        axis.set_visible(bool(arm))
        if not arm:
            axes[place - columns].tick_params(labelbottom=True)
            continue
        if reference in curves and arm != reference:
            axis.plot(curves[reference].cost, curves[reference].mean, color=REFERENCE_GREY, linewidth=1.2, zorder=2)
        axis.plot(curves[arm].cost, curves[arm].mean, color=looks[arm].colour, zorder=3)
        arm_title(axis, arm, looks[arm].colour)
        axis.margins(x=0.02)
        _common_scale(axis, list(curves.values()))
        first = place % columns == 0
        axis.tick_params(axis="y", labelleft=first)
        axis.set_ylabel(label if first and len(shown) > 1 else "", fontsize=7.5)
    amounts(axes[0].xaxis, bins=3)
    label_below(figure, cost_label(scores.study.currency))
    if len(shown) == 1:
        figure.supylabel(shown[0][0], fontsize=8.5)
    return figure


def _common_scale(axis: Axes, curves: list[Band]) -> None:
    """The scale of `_positive_scale` with ends that hold the means of all arms."""
    _positive_scale(axis, curves)
    means = np.concatenate([curve.mean for curve in curves])
    low, high = float(means.min()), float(means.max())
    if axis.get_yscale() == "log":
        axis.set_ylim(low / 1.2, high * 1.2)
        compact_log(axis.yaxis, (1.0,) if high > 10 * low else (1.0, 2.0, 5.0))
    else:
        axis.set_ylim(min(0.0, low), high + 0.08 * (high - min(0.0, low)))


def _positive_scale(axis: Axes, curves: list[Band]) -> None:
    """A logarithmic axis where arms differ by more than a factor of ten, for instance by loss scale."""
    means = np.concatenate([curve.mean for curve in curves])
    if means.min() > 0 and means.max() > 10 * means.min():
        axis.set_yscale("log")
        compact_log(axis.yaxis)
    elif means.min() >= 0:
        axis.set_ylim(bottom=0)


def rollouts_per_prompt(scores: Scores) -> Figure | None:
    """Share of a step's prompts by their number of rollouts, over training spend, per allocating arm.

    On a scale of doublings where an arm goes far beyond the usual one's largest number.
    """
    study = scores.study
    arms = dynamic_arms(study)
    if not arms:
        return None
    shares = {arm: rollout_shares(study, arm) for arm in arms}
    most = [float(values[-1]) for _, values, _ in shares.values()]
    doublings = max(most) > FAR_OUT * float(np.median(most))
    arms = part_of_panels(arms)
    figure, axes = panels(len(arms), 3, height=2.1)
    mesh = None
    for axis, arm in zip(axes, arms, strict=True):
        edges, values, share = shares[arm]
        heights = np.concatenate([values - 0.5, values[-1:] + 0.5]).clip(min=NO_ROLLOUT if doublings else -0.5)
        mesh = axis.pcolormesh(
            edges, heights, share, cmap="Blues", vmin=0, vmax=usual_share(list(shares.values())), rasterized=True
        )
        mean = values @ share
        centres = (edges[:-1] + edges[1:]) / 2
        axis.plot(centres, mean, color="#D55E00", linewidth=1.2, linestyle=(0, (3, 1.5)), label="mean")
        arm_title(axis, arm, styles(study.plan["arms"])[arm].colour)
        axis.grid(visible=False)
    _rollout_scale(axes[0], max(most), doublings)
    amounts(axes[0].xaxis, bins=2 if narrow() else 4)
    axes[0].legend(loc="upper right", handlelength=2.2, frameon=True, framealpha=0.85, edgecolor="none")
    label_below(figure, cost_label(study.currency))
    figure.supylabel("rollouts of a prompt", fontsize=8.5)
    if mesh is not None:
        bar = figure.colorbar(
            mesh, ax=axes, shrink=0.9, aspect=max(18, 5 * figure.get_figheight()), pad=0.02, extend="max"
        )
        percent(bar.ax.yaxis)
        bar.set_label("share of prompts, %")
        bar.outline.set_visible(False)
    return figure


def usual_share(shares: Sequence[tuple[Floats, Floats, Floats]]) -> float:
    """The share that the darkest colour stands for: of the usual arm's most frequent number, when it varies.

    The largest of all would be 1: an arm that reads histories gives every prompt the same until it has some.
    """
    largest = [share.max(axis=0) for _, _, share in shares]
    varied = [float(np.quantile(own[own < 1 - 1e-9], 0.9)) for own in largest if own.min() < 1 - 1e-9]
    return float(np.median(varied)) if varied else 1.0


def _rollout_scale(axis: Axes, most: float, doublings: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    if not doublings:
        axis.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        return
    axis.set_yscale("log", base=2)
    powers = [2**power for power in range(0, int(np.log2(most)) + 1, 1 if most < 40 else 2)]
    axis.set_yticks([2**0.5 * NO_ROLLOUT, *powers], ["0", *map(str, powers)])
    axis.minorticks_off()
    axis.set_ylim(NO_ROLLOUT, most + 0.5)


def pass_at_k(scores: Scores) -> Figure | None:
    """pass@k of the final evaluation over k; on the right the difference to the reference.

    Where there are too many arms for one panel: the difference alone, a panel an arm.
    """
    study, looks, weights = scores.study, styles(scores.study.plan["arms"]), family_weights(scores.families)
    tries = [k for k in (1, 2, 4, 8, 16, 32) if k <= study.samples]
    curves = {
        arm: np.array([(scores.final(arm, f"pass_at_{k}") @ weights).mean() for k in tries]) for arm in study.arms
    }
    base = curves.get(study.reference)
    if base is not None and len(curves) > CROWDED:
        return _differences_over_tries(scores, tries)
    figure, axes = beside(1 if base is None else 2, 2.2 if narrow() else 3.3)
    for arm, curve in curves.items():
        strong = arm in (study.reference, "dynamo")
        for axis, values in zip(axes, [curve] if base is None else [curve, curve - base], strict=True):
            line(axis, np.array(tries), values, looks[arm], arm, strong=strong, sparse=False)
    axes[0].set_title(f"{metric_name('pass_at_k')}, %", loc="left")
    if base is not None:
        axes[1].set_title(f"difference to {study.reference}, points", loc="left")
    for axis in axes:
        _tries(axis, tries)
        axis.set_xlabel("tries, k")
    legend_right(figure, axes[-1])
    return figure


def _differences_over_tries(scores: Scores, tries: Sequence[int]) -> Figure:
    """Difference to the reference over k, mean and interval over seeds, a panel an arm.

    One scale for all but the arms that would flatten the others; those have a scale of their own, in their colour.
    """
    reference = scores.study.reference
    arms = [arm for arm in scores.study.arms if arm != reference and scores.seeds(arm, reference)]
    gaps = {arm: gap_over_tries(scores, arm, tries) for arm in arms}
    figure = difference_panels(scores, gaps, lambda axis: _tries(axis, tries), markers=True)
    label_below(figure, "tries, k")
    figure.supylabel(f"{metric_name('pass_at_k')} minus {reference}, points", fontsize=8.5)
    return figure


def difference_panels(
    scores: Scores, gaps: Mapping[str, Band], finish: Callable[[Axes], None], *, markers: bool = False
) -> Figure:
    """A panel an arm of its difference to the reference, mean and interval over seeds.

    One scale for all but the arms that would flatten the others; those have a scale of their own, in their colour.

    Args:
        finish: sets the axes of a panel. markers: draw one at every value.
    """
    looks = styles(scores.study.plan["arms"])
    reach = {arm: float(np.abs(gap.runs).max()) for arm, gap in gaps.items()}
    usual = [arm for arm in gaps if reach[arm] <= FAR_OUT * np.median(list(reach.values()))]
    shown = part_of_panels(list(gaps))
    figure, axes = panels(len(shown), _COLUMNS, height=1.0 if narrow() else 1.2, share_y=False)
    labelled = set()
    for axis, arm in zip(axes, shown, strict=True):
        gap, look = gaps[arm], looks[arm]
        axis.axhline(0.0, color=REFERENCE_GREY, linewidth=1.2, zorder=2)
        _draw(axis, gap, Style(look.colour, look.marker, (0, ())))
        if markers:
            axis.plot(gap.cost, gap.mean, color=look.colour, marker=look.marker, markersize=3, zorder=4)
        arm_title(axis, arm, look.colour)
        _limits(axis, [gaps[other] for other in usual] if arm in usual else [gap])
        finish(axis)
        place = axis.get_subplotspec()
        row = 0 if place is None else place.rowspan.start
        if arm not in usual:
            axis.tick_params(axis="y", labelcolor=look.colour)
        elif row in labelled:
            axis.tick_params(axis="y", labelleft=False)
        else:
            labelled.add(row)
    return figure


def _tries(axis: Axes, tries: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(tries, [str(k) for k in tries])
    axis.minorticks_off()
    percent(axis.yaxis)
