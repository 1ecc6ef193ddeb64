"""Figures of a sweep: what mattered, where the objective is high, and how the search went."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.figures import Drawn
from analysis.formatting import metric_name
from analysis.palette import styles
from analysis.plotting import new_figure, panels, percent, rows, save, theme
from analysis.statistics import Floats
from analysis.sweep_data import FEWEST, SweepRecord
from benchmark.sweep_trial import DONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATORS = {"fANOVA": "#4477AA", "PED-ANOVA": "#CC8400"}
MAP = "viridis"


def write_sweep_figures(record: SweepRecord, folder: Path) -> list[Drawn]:
    """Draw what there is data for as ``<folder>/<name>.{svg,pdf,png}``; stale figures go.

    Returns:
        The figures, in the order in which a report shows them.
    """
    goal = metric_name(record.config.objective[0])
    draw: dict[str, tuple[Callable[[], Figure | None], str]] = {
        "importance": (
            partial(importance, record),
            f"Importance of each searched parameter for {goal} by arm: over the whole range (fANOVA) and for getting "
            "among the best tenth of the trials (PED-ANOVA).",
        ),
        "history": (
            partial(history, record),
            f"Mean {goal} over the tuning seeds of every trial, in order, and the best so far; the first: the default.",
        ),
        "pareto": (
            partial(pareto, record),
            f"Both objectives of every trial; filled: no trial is better in both ({goal}).",
        ),
    }
    for label in record.labels:
        draw |= {
            f"slice_{label}": (
                partial(slices, record, label),
                f"{label}: mean {goal} of every trial over each parameter; cross: the default; later trials darker.",
            ),
            f"contour_{label}": (
                partial(contour, record, label),
                f"{label}: mean {goal}, interpolated between trials, over the two parameters of largest fANOVA share.",
            ),
            f"parallel_coordinates_{label}": (
                partial(parallel_coordinates, record, label),
                f"{label}: a line a trial through its parameters, lighter for higher {goal}; the upper quarter strong.",
            ),
        }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with theme():
        for name, (figure, caption) in draw.items():
            drawn = figure()
            for stale in folder.glob(f"{name}.*") if drawn is None else ():
                stale.unlink()
            if drawn is not None:
                save(drawn, folder, name)
                written.append(Drawn(name, caption))
    return written


def importance(record: SweepRecord) -> Figure | None:
    """Bars of fANOVA and PED-ANOVA shares, a panel an arm."""
    found = {label: shares for label in record.labels if (shares := record.importances(label)) is not None}
    if not found:
        return None
    heights = [len(shares) for shares in found.values()]
    figure = new_figure(0.27 * sum(heights) + 0.45 * len(heights) + 0.4)
    axes = figure.subplots(len(found), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, (label, shares) in zip(axes.flat, found.items(), strict=True):
        shares = shares.sort_values("fANOVA", ascending=False)
        for place, (name, colour) in enumerate(EVALUATORS.items()):
            at = np.arange(len(shares)) + (place - 0.5) * 0.38
            axis.barh(at, shares[name], height=0.36, color=colour, label=name)
        rows(axis, [short(key) for key in shares.index])
        axis.set_title(f"{label} ({len(record.of(label, DONE))} trials)", loc="left")
        percent(axis.xaxis)
    axes.flat[-1].set_xlabel("share of importance, %")
    axes.flat[0].legend(loc="lower right")
    return figure


def history(record: SweepRecord) -> Figure | None:
    """Trials in order and the best so far, a panel an arm."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels(len(record.labels), 3)
    for axis, (label, style) in zip(axes, styles(record.labels).items(), strict=True):
        numbers, means = _means(record, label)
        axis.plot(numbers, means, ".", color=style.colour, alpha=0.6, markersize=4)
        axis.step(numbers, np.maximum.accumulate(means), where="post", color=style.colour, linewidth=1.2)
        axis.set_title(label, loc="left")
        percent(axis.yaxis)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.set_xlabel("trial")
    axes[0].set_ylabel(f"{metric_name(record.config.objective[0])}, %")
    return figure


def slices(record: SweepRecord, label: str) -> Figure | None:
    """The objective over each parameter alone."""
    numbers, means = _means(record, label)
    if len(means) < FEWEST:
        return None
    spaces = record.config.spaces(label)
    lines = -(-len(spaces) // 4)
    figure = new_figure(1.45 * lines)
    axes = list(figure.subplots(lines, min(4, len(spaces)), sharey=True, squeeze=False).flat)
    for axis in axes[len(spaces) :]:
        axis.set_visible(False)
    for axis, key in zip(axes, spaces, strict=False):
        at, axis_settings = _axis(record, label, key)
        axis.scatter(at, means, c=numbers, cmap="Greys", vmin=-len(numbers), s=10, linewidths=0)
        first = numbers == 0
        axis.plot(at[first], means[first], "x", color="#D55E00", markersize=5)
        axis_settings(axis.xaxis)
        axis.set_xlabel(short(key))
        percent(axis.yaxis)
    for axis in axes[::4]:
        axis.set_ylabel(f"{metric_name(record.config.objective[0])}, %")
    return figure


def contour(record: SweepRecord, label: str) -> Figure | None:
    """The objective over the two parameters that matter most."""
    shares, (_, means) = record.importances(label), _means(record, label)
    if shares is None or len(shares) < 2:
        return None
    keys = list(shares["fANOVA"].sort_values(ascending=False).index[:2])
    (x, x_axis), (y, y_axis) = (_axis(record, label, key) for key in keys)
    if min(len(np.unique(x)), len(np.unique(y))) < 2:
        return None
    figure = new_figure(2.9)
    axis = figure.subplots()
    # Triangles are drawn on the unit square, where no parameter outweighs the other.
    from matplotlib.tri import Triangulation

    triangles = Triangulation(x, y, Triangulation(_unit(x), _unit(y)).triangles)
    filled = axis.tricontourf(triangles, means, levels=9, cmap=MAP)
    axis.plot(x, y, ".", color="black", markersize=3)
    for own, set_up, key in ((axis.xaxis, x_axis, keys[0]), (axis.yaxis, y_axis, keys[1])):
        set_up(own)
        own.set_label_text(short(key))
    axis.grid(visible=False)
    bar = figure.colorbar(filled, ax=axis, label=f"{metric_name(record.config.objective[0])}, %")
    percent(bar.ax.yaxis)
    return figure


def parallel_coordinates(record: SweepRecord, label: str) -> Figure | None:
    """One line a trial through all its parameters, on the scale of the search."""
    import matplotlib as mpl

    _, means = _means(record, label)
    if len(means) < FEWEST:
        return None
    keys = list(record.config.spaces(label))
    heights = np.stack([_unit(_axis(record, label, key)[0], _ends(record, label, key)) for key in keys], axis=1)
    norm = mpl.colors.Normalize(float(means.min()), float(means.max()))
    figure = new_figure(2.8)
    axis = figure.subplots()
    for place in np.argsort(means):
        strong = means[place] >= np.quantile(means, 0.75)
        colour = mpl.colormaps[MAP](norm(means[place]))
        axis.plot(heights[place], color=colour, alpha=0.95 if strong else 0.25, linewidth=1.1 if strong else 0.7)
    axis.set_xticks(range(len(keys)), [short(key) for key in keys], rotation=25, ha="right")
    axis.set_yticks([0, 1], ["low", "high"])
    axis.grid(visible=True, axis="x")
    colours = mpl.cm.ScalarMappable(norm, mpl.colormaps[MAP])
    bar = figure.colorbar(colours, ax=axis, label=f"{metric_name(record.config.objective[0])}, %")
    percent(bar.ax.yaxis)
    return figure


def pareto(record: SweepRecord) -> Figure | None:
    """Accuracy and gradient variance of every trial; None for one objective."""
    if len(record.config.objective) < 2:
        return None
    figure, axes = panels(len(record.labels), 3, 1.8)
    for axis, (label, style) in zip(axes, styles(record.labels).items(), strict=True):
        accuracy, variance = (record.values(label, goal).mean(axis=1) for goal in record.config.objective)
        front = np.array([not np.any((accuracy > a) & (variance < v)) for a, v in zip(accuracy, variance, strict=True)])
        axis.plot(variance, accuracy, "o", color=style.colour, fillstyle="none", markersize=4)
        axis.plot(variance[front], accuracy[front], "o", color=style.colour, markersize=4)
        axis.set_title(label, loc="left")
        axis.set_xlabel("relative gradient variance")
        percent(axis.yaxis)
    axes[0].set_ylabel(f"{metric_name(record.config.objective[0])}, %")
    return figure


def short(key: str) -> str:
    """A parameter as a label: its last two parts."""
    return ".".join(key.removeprefix("method.").split(".")[-2:])


def _means(record: SweepRecord, label: str) -> tuple[Floats, Floats]:
    """Numbers and mean objectives of an arm's whole trials."""
    numbers = record.of(label, DONE)["number"].to_numpy(dtype=np.float64)
    return numbers, record.values(label, record.config.objective[0]).mean(axis=1)


def _axis(record: SweepRecord, label: str, key: str) -> tuple[Floats, Callable[[Any], None]]:
    """Where a parameter's values lie (logarithms where the search was logarithmic), and how to label them."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    space = record.config.spaces(label)[key]
    points = [point[key] for point in record.of(label, DONE)["point"]]
    if space.type == "categorical":
        choices = list(space.points)
        names = [str(choice) for choice in choices]
        return np.array([float(choices.index(p)) for p in points]), lambda axis: axis.set_ticks(
            range(len(names)), names
        )
    log = bool(space.log)

    def label_ticks(axis: Any) -> None:
        axis.set_major_locator(MaxNLocator(3, integer=space.type == "int" and not log))
        if log:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{float(f'{10**value:.2g}'):g}"))

    values = np.array(points, dtype=np.float64)
    return np.log10(values) if log else values, label_ticks


def _ends(record: SweepRecord, label: str, key: str) -> tuple[float, float]:
    space = record.config.spaces(label)[key]
    if space.type == "categorical":
        return 0.0, len(space.points) - 1.0
    ends = np.array([space.low, space.high], dtype=np.float64)
    low, high = np.log10(ends) if space.log else ends
    return float(low), float(high)


def _unit(values: Floats, ends: tuple[float, float] | None = None) -> Floats:
    low, high = ends or (float(values.min()), float(values.max()))
    return (values - low) / (high - low)
