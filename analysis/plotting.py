"""The look of every figure: one theme, paper sizes, axis labels in units, files that are the same every
time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.formatting import amount, currency_name
from benchmark.jsonl import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from analysis.palette import Style

WIDTH = 6.9  # inches: a text width of A4 or letter paper
FORMATS = ("svg", "pdf", "png")
REFERENCE_GREY = "#9A9A9A"

# No date and no random ids: equal results give equal files. Fonts are embedded (pdf) or drawn as paths (svg).
_METADATA: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
_RC: Any = {
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "rolloutbench",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@contextlib.contextmanager
def theme() -> Iterator[None]:
    """The settings under which figures are drawn and saved; settings of the caller come back afterwards."""
    import matplotlib as mpl
    import seaborn as sns

    with mpl.rc_context(), sns.axes_style("ticks"):
        mpl.rcParams.update(_RC)
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure that no global state knows (so that nothing has to be closed); sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def panels(count: int, columns: int, height: float = 1.35, *, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of small panels with shared axes, row by row.

    Args:
        count: panels; places left over in the last row stay empty, and the panel above has the tick labels.
        columns: at most this many in a row. height: of a row, in inches. share_y: one scale for all.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(height * rows + 0.55)
    grid = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False)
    axes = list(grid.flat)
    for place, axis in enumerate(axes):
        if place >= count:
            axis.set_visible(False)
        elif place + columns >= count:
            axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``<folder>/<name>.{svg,pdf,png}``; call it inside `theme`."""
    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for path in paths:
        kind, drawn = path.suffix[1:], BytesIO()
        figure.savefig(drawn, format=kind, metadata=_METADATA[kind])
        atomic_write_bytes(path, drawn.getvalue())
    return paths


def amounts(axis: Axis, bins: int = 4) -> None:
    """Tick labels as compact amounts: 600k, 1.2M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 4, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))


def percent(axis: Axis, bins: int = 5) -> None:
    """Tick labels of fractions in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}".replace("-", "\N{MINUS SIGN}")))


def cost_label(currency: str) -> str:
    """The label of an axis that shows training spend."""
    name = currency_name(currency)
    return f"training spend ({name})" if name.endswith("FLOPs") else f"training spend, {name}"


def point(axis: Axes, y: float, x: float, ends: tuple[float, float], style: Style) -> None:
    """Row `y` of a forest plot: a marker at `x` and a horizontal interval (left out where it is NaN)."""
    low, high = ends
    if low == low and high == high:
        axis.plot([low, high], [y, y], color=style.colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
        axis.plot([low, high], [y, y], "|", color=style.colour, markersize=5, zorder=2)
    axis.plot(
        [x], [y], style.marker, color=style.colour, markersize=6, markeredgecolor="white", markeredgewidth=0.5, zorder=3
    )


def rows(axis: Axes, labels: list[str]) -> None:
    """Name the rows of a forest plot or of bars, the first on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)


def legend_right(figure: Figure, axis: Axes) -> None:
    """One legend for all panels, in a column outside at the right."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=2.6, labelspacing=0.55)
