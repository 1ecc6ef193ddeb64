"""Figures of a replay: calibration of the history rules, variance of the allocators, drift of the success rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.figures import Drawn
from analysis.palette import SPARE, styles
from analysis.plotting import REFERENCE_GREY, new_figure, percent, point, rows, save, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.replay import Findings


def calibration(found: Findings) -> Figure:
    """Observed against predicted success rate, a panel a rule; points grow with the rollouts behind them."""
    from analysis.replay import PREDICTORS

    shown = [row for row in found.predictors if len(row.calibration) > 1]
    columns = -(-len(shown) // 2)
    figure = new_figure(3.6)
    axes: list[Axes] = list(figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis, row, look in zip(axes, shown, SPARE, strict=False):
        axis.plot([0, 1], [0, 1], color=REFERENCE_GREY, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        total = sum(part["rollouts"] for part in row.calibration)
        x, y = ([part[key] for part in row.calibration] for key in ("predicted", "observed"))
        sizes = [8 + 180 * part["rollouts"] / total for part in row.calibration]
        axis.plot(x, y, color=look.colour, linewidth=1.0, zorder=2)
        axis.scatter(x, y, s=sizes, color=look.colour, linewidths=0, alpha=0.85, zorder=3)
        axis.set_title(PREDICTORS[row.name], loc="left", fontsize=7.5)
        percent(axis.xaxis, 4)
        percent(axis.yaxis, 4)
        axis.set_aspect("equal")
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("predicted success rate of the next visit, %", fontsize=8.5)
    figure.supylabel("observed, %", fontsize=8.5)
    return figure


def allocators(found: Findings) -> Figure:
    """Variance relative to uniform with intervals, a row an allocator."""
    from analysis.replay import ALLOCATORS

    shown = [row for row in found.allocators if row.name != "grpo"]
    look = styles([row.name for row in shown])
    figure = new_figure(0.26 * len(shown) + 0.8)
    axis = figure.subplots()
    axis.axvline(1.0, color=REFERENCE_GREY, linewidth=0.9)
    for y, row in enumerate(shown):
        point(axis, y, row.variance_ratio, (row.low, row.high), look[row.name])
    rows(axis, [ALLOCATORS.get(row.name, row.name) for row in shown])
    axis.set_xlabel("variance relative to uniform allocation under the p (1 − p) / n law, 95 % interval")
    return figure


def success_rate(found: Findings) -> Figure:
    """Success rate of all prompts by visit."""
    figure = new_figure(2.0)
    axis = figure.subplots()
    axis.plot(range(1, len(found.drift) + 1), found.drift, color="#0072B2")
    axis.set_xlabel("visit")
    axis.set_ylabel("success rate, %")
    percent(axis.yaxis)
    return figure


CAPTIONS = {
    "calibration": "Observed against predicted success rate of the next visit by history rule; on the dashed line a "
    "rule is calibrated, larger points are more rollouts.",
    "allocators": "Variance that each allocator would have had, relative to uniform allocation at the same rollouts; "
    "below 1 is better.",
    "success_rate": "Success rate over all prompts by visit: what a history that forgets nothing lags behind.",
}


def write_replay_figures(found: Findings, folder: Path) -> list[Drawn]:
    """Draw every figure into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with theme():
        for draw in (calibration, allocators, success_rate):
            save(draw(found), folder, draw.__name__)
    return [Drawn(name, caption) for name, caption in CAPTIONS.items()]
