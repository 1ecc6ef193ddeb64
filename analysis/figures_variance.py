"""Figures of the gradient-variance study; every function takes the frames of `analysis.variance_report`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.figures import Drawn
from analysis.palette import DASHED, DOTTED, SOLID, Style, styles
from analysis.plotting import label_below, new_figure, percent, save, theme
from analysis.variance_allocators import LABELS, NAMES, RULES
from analysis.variance_replay import proxy
from methods.allocation import bounds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "uniform": Style("#595959", "o", SOLID),
    "dynamo_released": Style("#9E2A2B", "d", DASHED),
    "dynamo_readme": Style("#E0523D", "d", SOLID),
    "variance": Style("#0072B2", "s", SOLID),
    "neyman": Style("#D55E00", "D", SOLID),
    "gvm": Style("#117733", "^", SOLID),
    "knapsack": Style("#882255", "v", SOLID),
    "cures": Style("#8A8A1F", "P", SOLID),
    "gradient": Style("#00A87A", "h", SOLID),
    "oracle_p": Style("#AA4499", "X", DOTTED),
    "oracle_variance": Style("#332288", "*", DOTTED),
    "oracle_unbounded": Style("#4BA3D9", "*", DASHED),
}
REFERENCE: dict[str, Any] = {"color": "#444444", "linewidth": 0.9, "zorder": 1}


def variance_ratio(frame: pd.DataFrame, checkpoint: str) -> Figure:
    """Ratio to uniform with intervals: a row of panels an advantage, a column a budget."""
    mine = _of(frame, checkpoint=checkpoint)
    kinds, budgets = list(mine["advantage"].unique()), sorted(mine["budget"].unique())
    figure = new_figure(1.62 * len(kinds) + 0.5)
    grid = figure.subplots(len(kinds), len(budgets), sharex="row", sharey=True, squeeze=False)
    present = set(mine["allocator"])
    shown = [name for name in NAMES if name != "uniform" and name in present]
    for r, kind in enumerate(kinds):
        for c, budget in enumerate(budgets):
            axis: Axes = grid[r][c]
            axis.axvline(1.0, **REFERENCE)
            part = _of(mine, advantage=kind, budget=budget).set_index("allocator")
            for y, name in enumerate(shown):
                row, look = part.loc[name], STYLES[name]
                axis.plot([row["low"], row["high"]], [y, y], color=look.colour, linewidth=1.5, solid_capstyle="butt")
                axis.plot(row["ratio"], y, look.marker, color=look.colour, markersize=4.5, markeredgewidth=0)
            axis.set_yticks(range(len(shown)), [LABELS[name] for name in shown])
            axis.set_ylim(len(shown) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0, labelsize=6.5)
            axis.locator_params(axis="x", nbins=4)
            if r == 0:
                axis.set_title(f"n = {budget} per prompt", loc="left")
        grid[r][-1].yaxis.set_label_position("right")
        grid[r][-1].set_ylabel(kind, rotation=270, va="bottom")
    label_below(figure, "variance of the gradient relative to uniform allocation, 95 % interval")
    return figure


def predicted_and_realised(frame: pd.DataFrame, budget: int) -> Figure:
    """Reduction that each rule predicts against the one measured, a panel an advantage, a point a checkpoint."""
    mine = _of(frame, budget=budget)
    mine = mine[mine["allocator"] != "uniform"]
    kinds = list(mine["advantage"].unique())
    figure = new_figure(3.1)
    axes: list[Axes] = list(figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0])
    span = 1 - np.array([mine["predicted"].max(), mine["predicted"].min()])
    for axis, kind in zip(axes, kinds, strict=True):
        axis.plot(span, span, **REFERENCE, linestyle=(0, (4, 2)))
        axis.axhline(0.0, color="#BBBBBB", linewidth=0.7, zorder=1)
        for name in NAMES:
            part, look = _of(mine, advantage=kind, allocator=name), STYLES[name]
            axis.plot(
                1 - part["predicted"],
                1 - part["ratio"],
                look.marker,
                color=look.colour,
                markersize=4,
                markeredgewidth=0,
                alpha=0.85,
                label=LABELS[name] if len(part) else None,
            )
        axis.set_title(f"advantage: {kind}", loc="left")
        percent(axis.xaxis)
        percent(axis.yaxis)
    axes[0].set_ylabel("measured reduction, %")
    label_below(figure, "reduction that the rule's own model predicts, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, handletextpad=0.2, columnspacing=0.8, fontsize=7
    )
    return figure


def variance_and_p(prompts: pd.DataFrame, checkpoint: str) -> Figure:
    """V_i against p (1 - p) for each advantage, coloured by answer length; the line is the law V ~ p (1 - p)."""
    mine = _of(prompts, checkpoint=checkpoint)
    kinds = list(mine["advantage"].unique())
    figure = new_figure(2.6)
    axes: list[Axes] = list(figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0])
    for axis, kind in zip(axes, kinds, strict=True):
        part = _of(mine, advantage=kind)
        p, V = part["p"].to_numpy(float), part["variance"].to_numpy(float)
        fit = proxy(p, V)
        use = (p > 0) & (p < 1) & (V > 0)
        x = p[use] * (1 - p[use])
        cloud = axis.scatter(x, V[use], c=part["tokens"][use], cmap="viridis", s=13, linewidths=0, zorder=2)
        ends = np.array([x.min(), x.max()])
        level = np.exp(np.mean(np.log(V[use]) - np.log(x)))
        axis.plot(ends, level * ends, **REFERENCE, linestyle=(0, (4, 2)))
        axis.set_xscale("log")
        axis.set_yscale("log")
        text = f"R² = {fit['r_squared']:.2f} [{fit['r_squared_low']:.2f}, {fit['r_squared_high']:.2f}]"
        axis.set_title(f"{kind}\n{text}, slope {fit['slope']:.2f}", loc="left", fontsize=7)
        axis.set_xlabel("p (1 − p)")
    axes[0].set_ylabel("variance of the prompt's gradient")
    figure.colorbar(cloud, ax=axes, label="mean tokens of an answer", pad=0.01)
    return figure


def rollouts_and_p_hat(allocations: pd.DataFrame, checkpoint: str, budget: int) -> Figure:
    """Rollouts per prompt against the success rate of the history sample, a panel a rule."""
    mine = _of(allocations, checkpoint=checkpoint, budget=budget)
    figure = new_figure(3.5)
    axes: list[Axes] = list(figure.subplots(2, -(-len(RULES) // 2), sharex=True, sharey=True, squeeze=False).flat)
    low, high = bounds(1, budget, None, None)
    for axis, name in zip(axes, RULES, strict=False):
        part, look = _of(mine, allocator=name), STYLES[name]
        points = part.groupby(["p_hat", "n"]).size().reset_index(name="prompts")
        for level in (low, high):
            axis.axhline(level, color="#BBBBBB", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
        axis.scatter(
            points["p_hat"], points["n"], s=5 + 6 * points["prompts"], color=look.colour, linewidths=0, alpha=0.8
        )
        axis.set_title(textwrap.fill(LABELS[name], 18), loc="left", fontsize=7.5)
    for axis in axes[len(RULES) :]:
        axis.set_visible(False)
    axes[0].locator_params(axis="y", integer=True)
    label_below(figure, "success rate of the history sample")
    figure.supylabel("rollouts of the prompt", fontsize=8.5)
    return figure


def along_training(frame: pd.DataFrame, budget: int) -> Figure:
    """Variance under uniform allocation (top) and ratios of some allocators (bottom) over training, by arm."""
    mine = _of(frame, budget=budget)
    kinds, arms = list(mine["advantage"].unique()), list(dict.fromkeys(mine.loc[mine["fraction"] > 0, "arm"]))
    looks = styles(arms)
    figure = new_figure(4.3)
    grid = figure.subplots(2, len(kinds), sharex=True, sharey="row", squeeze=False)
    shown = [
        name for name in ("dynamo_released", "neyman", "gradient", "oracle_variance") if name in set(mine["allocator"])
    ]
    for c, kind in enumerate(kinds):
        top, bottom = grid[0][c], grid[1][c]
        bottom.axhline(1.0, **REFERENCE)
        for arm in arms:
            part = _of(mine[(mine["arm"] == arm) | (mine["fraction"] == 0)], advantage=kind)
            line = _of(part, allocator="uniform").sort_values("fraction")
            _band(top, line, ("variance", "variance_low", "variance_high"), looks[arm], arm)
            for name in shown:
                line = _of(part, allocator=name).sort_values("fraction")
                dash = SOLID if arm == arms[0] else DASHED
                look = Style(STYLES[name].colour, STYLES[name].marker, dash)
                _band(bottom, line, ("ratio", "low", "high"), look, LABELS[name] if arm == arms[0] else "")
        top.set_title(f"advantage: {kind}", loc="left")
        top.set_yscale("log")
        percent(bottom.xaxis)
    grid[0][0].set_ylabel("variance, uniform")
    grid[1][0].set_ylabel("ratio to uniform")
    others = f"; dashed: {', '.join(arms[1:])}" if arms[1:] else ""
    label_below(figure, f"training budget spent, % (below, solid: {arms[0]}{others})")
    grid[0][-1].legend(loc="best")
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown))
    return figure


def _band(axis: Axes, line: pd.DataFrame, names: tuple[str, str, str], look: Style, label: str) -> None:
    x, (value, low, high) = line["fraction"], (line[name] for name in names)
    axis.plot(x, value, marker=look.marker, color=look.colour, linestyle=look.dash, markersize=3.5, label=label or None)
    axis.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)


def _of(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for key, value in values.items():
        frame = frame[frame[key] == value]
    return frame


def write_variance_figures(
    frame: pd.DataFrame, prompts: pd.DataFrame, allocations: pd.DataFrame, budget: int, folder: Path
) -> list[Drawn]:
    """Draw every figure of the study into `folder`.

    Args:
        frame, prompts, allocations: rows of `analysis.variance_replay`, with checkpoint, arm and fraction.
        budget: rollouts per prompt of the figures that show one.
    """
    gradient = _of(frame, coordinates="gradient")
    labels: Sequence[str] = list(dict.fromkeys(frame["checkpoint"]))
    first, last = labels[0], labels[-1]
    at = f"{budget} rollouts per prompt"
    plans: dict[str, tuple[Callable[[], Figure], str]] = {
        "variance_ratio": (
            lambda: variance_ratio(gradient, first),
            f"Variance of the gradient relative to uniform allocation at equal draws, {first}; below 1 is better.",
        ),
        "variance_ratio_last": (
            lambda: variance_ratio(gradient, last),
            f"The same for the last checkpoint ({last}).",
        ),
        "predicted_and_realised": (
            lambda: predicted_and_realised(gradient, budget),
            f"Reduction of the variance that a rule's own model predicts and the one measured, at {at}; a point a "
            "checkpoint; on the dashed line the prediction holds, below 0 the rule is worse than uniform.",
        ),
        "variance_and_p": (
            lambda: variance_and_p(_of(prompts, coordinates="gradient"), first),
            f"Measured variance of every prompt's gradient estimate at {at} against p (1 - p), {first}; the dashed "
            "line is the law V proportional to p (1 - p).",
        ),
        "rollouts_and_p_hat": (
            lambda: rollouts_and_p_hat(allocations, first, budget),
            f"What each rule gives a prompt by the success rate of its history sample, {first}, {at}; dashed: bounds; "
            "larger points are more prompts.",
        ),
    }
    if frame["fraction"].nunique() > 1:
        plans["along_training"] = (
            lambda: along_training(gradient, budget),
            f"Variance along training at {at}: under uniform allocation, and of allocators relative to it; bands are "
            "95 % intervals.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with theme():
        for name, (draw, _) in plans.items():
            save(draw(), folder, name)
    return [Drawn(name, caption) for name, (_, caption) in plans.items()]
