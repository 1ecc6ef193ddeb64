"""The look of every figure: one theme, paper sizes, axis labels in units, files that are the same every
time.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from analysis.formatting import amount, currency_name
from benchmark.jsonl import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from analysis.palette import Style
    from analysis.statistics import Floats

Item = TypeVar("Item")

WIDTH = 6.9  # inches: a text width of A4 or letter paper
COLUMNS = {"single": 3.25, "double": 6.75}  # inches: widths of figures in a two-column paper
PAPER_HEIGHT = 8.5  # inches: what a figure may take of a paper's page
NARROW = 5.0  # inches: below it, panels go below each other and legends below the figure
CROWDED = 16  # arms: above it, curves get a panel each where they can, and legends go below the figure
AROUND_PANELS, LOWEST_PANEL = 0.55, 0.85  # inches: what a grid of panels needs beside them, and a row at least
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


@dataclass
class Sheet:
    """What figures are drawn on, in inches, and which part of a figure that takes several sheets.

    Attributes:
        width, height: of a figure; without a limit to its height it is in one part.
        part: the part to draw, from 0. parts: how many there are, as the drawing found out (`part_of`).
    """

    width: float = WIDTH
    height: float = math.inf
    part: int = 0
    parts: int = 1


_OUTSIDE = Sheet()  # of figures that are drawn without a theme
_sheet: ContextVar[Sheet] = ContextVar("_sheet", default=_OUTSIDE)


@contextlib.contextmanager
def theme(width: float = WIDTH, height: float = math.inf, part: int = 0) -> Iterator[Sheet]:
    """The settings under which figures are drawn and saved; settings of the caller come back afterwards.

    Args:
        width, height: of every figure, and the most that it may be high, in inches.
        part: which part is drawn of a figure that is higher.
    """
    import matplotlib as mpl
    import seaborn as sns

    sheet = Sheet(width, height, part)
    token = _sheet.set(sheet)
    try:
        with mpl.rc_context(), sns.axes_style("ticks"):
            mpl.rcParams.update(_RC)
            yield sheet
    finally:
        _sheet.reset(token)


def narrow() -> bool:
    """Whether figures are drawn for one column of a paper."""
    return _sheet.get().width < NARROW


def part_of(items: Sequence[Item], each: float) -> list[Item]:
    """The items that the part to draw shows, where a part has room for `each` of them; all if they fit."""
    sheet = _sheet.get()
    sheet.parts = 1 if each >= len(items) else math.ceil(len(items) / max(1, int(each)))
    size = math.ceil(len(items) / sheet.parts)
    return list(items[sheet.part * size : (sheet.part + 1) * size])


def part_of_rows(items: Sequence[Item], usual: float, around: float) -> tuple[list[Item], float]:
    """The rows of a figure, or of its part, and the height of each: `usual` inches, or a little less to fit a sheet.

    Args:
        around: inches of the figure that are no rows.
    """
    room = _sheet.get().height - around
    shown = part_of(items, room / (0.65 * usual))
    return shown, min(usual, room / max(1, len(shown)))


def part_of_stack(items: Sequence[Item], rows: int, usual: float, around: float) -> tuple[list[Item], float]:
    """Panels of a figure of `beside`, or of its part, and the height of each of the `rows` that every panel has.

    Args:
        usual: inches of a row, if they fit. around: inches of a panel that are no rows.
    """
    height = _sheet.get().height
    shown = part_of(items, height / (0.75 * usual * rows + around) if narrow() else math.inf)
    return shown, min(usual, (height / (len(shown) if narrow() else 1) - around) / rows)


def new_figure(height: float) -> Figure:
    """An empty figure that no global state knows (so that nothing has to be closed); `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_sheet.get().width, height))


def beside(count: int, height: float, *, share_x: bool = True, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `height` inches with axes beside each other, or below each other where it is narrow."""
    shape = (count, 1) if narrow() else (1, count)
    figure = new_figure(height * shape[0])
    return figure, list(figure.subplots(*shape, sharex=share_x, sharey=share_y, squeeze=False).flat)


def panel_grid(count: int, columns: int, height: float) -> tuple[int, float]:
    """Columns of a grid of panels, and the height of a row: more and lower ones where a sheet is too low for them.

    Args:
        count: panels. columns: at most this many in a row, if they fit. height: of a row, in inches.
    """
    sheet = _sheet.get()
    room = sheet.height - AROUND_PANELS
    chosen = min(columns, count, max(1, int(sheet.width / 1.6)))
    while -(-count // chosen) * 0.8 * height > room and chosen < int(sheet.width / 1.3):
        chosen += 1
    return chosen, min(height, room / -(-count // chosen))


def part_of_panels(items: Sequence[Item]) -> list[Item]:
    """The items that get a panel in the part to draw; all where a sheet has room for as many small panels."""
    return part_of(items, _most_panels())


def _most_panels() -> float:
    sheet = _sheet.get()
    rows = (sheet.height - AROUND_PANELS) / LOWEST_PANEL
    return max(1, int(sheet.width / 1.3)) * (int(rows) if math.isfinite(rows) else rows)


def chunks_of_panels(items: Sequence[Item]) -> list[list[Item]]:
    """The items in as many lists of about equal length as they take sheets with a panel for each."""
    parts = math.ceil(len(items) / most) if math.isfinite(most := _most_panels()) else 1
    size = math.ceil(len(items) / parts)
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def part_of_each(sheets: Sequence[Item]) -> list[Item]:
    """One of some sheets, as the part to draw; all of them where the height has no limit."""
    return part_of(sheets, 1 if math.isfinite(_sheet.get().height) else math.inf)


def panels(
    count: int, columns: int, height: float = 1.35, *, share_x: bool = True, share_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of small panels with shared axes, row by row.

    Args:
        count: panels; places left over in the last row stay empty, and the panel above has the tick labels.
        columns: at most this many in a row. height: of a row, in inches. share_x, share_y: one scale for all.
    """
    columns, height = panel_grid(count, columns, height)
    rows = -(-count // columns)
    figure = new_figure(height * rows + AROUND_PANELS)
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
    columns = grid.get_gridspec().ncols if grid is not None else 1
    room = 72 * (0.68 if narrow() else 0.86) * _sheet.get().width / columns
    axis.set_title(arm, color=colour, fontweight="bold", loc="left", pad=3, fontsize=min(8.5, room / (0.72 * len(arm))))


def compact_log(axis: Axis, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Plain numbers on a logarithmic axis, at multiples `subs` of the powers of ten: 1, 2, 5, 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=tuple(subs)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_subs(low: float, high: float, inches: float, size: float) -> tuple[float, ...]:
    """The most multiples for `compact_log` whose numbers in print of `size` points stay apart between two ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0, 5.0), (1.0,)):
        ticks = [sub * 10.0**decade for decade in decades for sub in subs]
        ticks = [tick for tick in ticks if low <= tick <= high]
        places = [inches * math.log(tick / low) / math.log(high / low) for tick in ticks]
        widths = [(len(f"{tick:g}") * 0.62 + 0.5) * size / 72 for tick in ticks]
        gaps = [right - left for left, right in pairwise(places)]
        needed = [(left + right) / 2 for left, right in pairwise(widths)]
        if len(ticks) > 1 and all(gap >= need for gap, need in zip(gaps, needed, strict=True)):
            return subs
    return (1.0,)


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
