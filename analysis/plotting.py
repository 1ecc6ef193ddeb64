"""The look of every figure: one theme, paper sizes, axis labels in units, files that are the same every
time.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from contextvars import ContextVar
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
    from analysis.statistics import Floats

WIDTH = 6.9  # inches: a text width of A4 or letter paper
COLUMNS = {"single": 3.25, "double": 6.75}  # inches: widths of figures in a two-column paper
NARROW = 5.0  # inches: below it, panels go below each other and legends below the figure
CROWDED = 16  # arms: above it, curves get a panel each where they can, and legends go below the figure
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


_width: ContextVar[float] = ContextVar("_width", default=WIDTH)


@contextlib.contextmanager
def theme(width: float = WIDTH) -> Iterator[None]:
    """The settings under which figures are drawn and saved; settings of the caller come back afterwards.

    Args:
        width: of every figure, in inches.
    """
    import matplotlib as mpl
    import seaborn as sns

    token = _width.set(width)
    try:
        with mpl.rc_context(), sns.axes_style("ticks"):
            mpl.rcParams.update(_RC)
            yield
    finally:
        _width.reset(token)


def narrow() -> bool:
    """Whether figures are drawn for one column of a paper."""
    return _width.get() < NARROW


def new_figure(height: float) -> Figure:
    """An empty figure that no global state knows (so that nothing has to be closed); `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_width.get(), height))


def beside(count: int, height: float, *, share_x: bool = True, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches with axes beside each other, or below each other where it is narrow."""
    shape = (count, 1) if narrow() else (1, count)
    figure = new_figure(height * shape[0])
    return figure, list(figure.subplots(*shape, sharex=share_x, sharey=share_y, squeeze=False).flat)


def panels(
    count: int, columns: int, height: float = 1.35, *, share_x: bool = True, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of small panels with shared axes, row by row.

    Args:
        count: panels; places left over in the last row stay empty, and the panel above has the tick labels.
        columns: at most this many in a row. height: of a row, in inches. share_x, share_y: one scale for all.
    """
    columns = min(columns, count, max(1, int(_width.get() / 1.6)))
    rows = -(-count // columns)
    figure = new_figure(height * rows + 0.55)
    grid = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False)
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
        figure.set_layout_engine("none")  # laid out once: the formats agree, and drawing takes half the time
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


def line(
    axis: Axes, x: Floats, y: Floats, style: Style, label: str, *, strong: bool = False, sparse: bool = True
) -> None:
    """A curve of an arm among those of others, told apart by colour, dash and marker.

    Args:
        strong: draw it wider. sparse: a few markers at even distances instead of one a point.
    """
    axis.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=3.5,
        markevery=(0.05, 0.17) if sparse else None,
        linewidth=1.9 if strong else 1.0,
        label=label,
    )


def rows(axis: Axes, labels: list[str]) -> None:
    """Name the rows of a forest plot or of bars, the first on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)


def label_x(figure: Figure, axis: Axes, text: str) -> None:
    """The label of the x axis; in a narrow figure below the whole of it."""
    if narrow():
        label_below(figure, text)
    else:
        axis.set_xlabel(text)


def label_below(figure: Figure, text: str) -> None:
    """One label for all x axes, in as many lines as it takes."""
    figure.supxlabel(textwrap.fill(text, 46) if narrow() else text, fontsize=8.5)


def arm_title(axis: Axes, arm: str, colour: str) -> None:
    """The name of an arm above its panel, small enough not to reach into the next one."""
    grid = axis.get_subplotspec()
    room = 72 * (0.68 if narrow() else 0.86) * _width.get() / (grid.get_gridspec().ncols if grid is not None else 1)
    axis.set_title(arm, color=colour, fontweight="bold", loc="left", pad=3, fontsize=min(8.5, room / (0.72 * len(arm))))


def compact_log(axis: Axis, *, decades: bool = False) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10; over a wide range only the powers of ten (`decades`)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_right(figure: Figure, axis: Axes) -> None:
    """One legend for all panels: a column outside at the right, or columns below a figure that is narrow or too low."""
    handles, labels = axis.get_legend_handles_labels()
    if not narrow() and len(labels) <= CROWDED:
        figure.legend(handles, labels, loc="outside right upper", handlelength=2.6, labelspacing=0.55)
        return
    longest = max(map(len, labels))
    columns = max(1, min(5, int(figure.get_figwidth() / (0.45 + 0.052 * longest))))  # inches: handle, letters
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.2, fontsize=6.5)
