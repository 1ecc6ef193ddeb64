"""How quantities of a step, or of a token, are spread: a row of cells an arm, darker where its share is larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparisons import Scores
from analysis.plotting import beside, compact_log, label_below, log_subs, narrow, part_of_stack, percent
from analysis.results import Study
from analysis.statistics import Floats
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
DARKEST = 0.35
"""Share of an arm's sample that gets the darkest grey; larger ones too, as the colour bar's end tells."""
MEDIAN = "#D55E00"
BINS, PRINT = 32, 6.5  # cells in a row; points of the numbers and names


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
    first minibatch have ratio 1, the middle of a cell.
    """
    return _tokens(scores, "ratio", "ratio of a token, pi / pi_old", centre=1.0)


def _tokens(
    scores: Scores, channel: str, label: str, floor: float | None = None, centre: float | None = None
) -> Figure | None:
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
    figure = _histograms(panels, "tokens", centre)
    label_below(figure, label)
    return figure


def _histograms(
    panels: Sequence[tuple[str, Mapping[str, Floats], bool]], what: str, centre: float | None = None
) -> Figure:
    """Panels of (title, sample by arm, whether the axis is logarithmic), with one scale of shares of `what`.

    Args:
        centre: a value that many have exactly, the middle of a cell.
    """
    arms = list(panels[0][1])
    panels, high = part_of_stack(panels, len(arms), 0.17, 0.75)
    figure, axes = beside(len(panels), high * len(arms) + 0.75, share_x=False, share_y=True)
    # Beside a panel stand the names of arms and the colour bar.
    room = (figure.get_figwidth() - 1.75) / (1 if narrow() else len(panels))
    meshes = []
    for axis, (title, values, logarithmic) in zip(axes, panels, strict=True):
        meshes.append(_rows_of_histograms(axis, list(values.values()), logarithmic, room, centre))
        axis.set_title(title, loc="left")
        axis.set_yticks(range(len(arms)), arms)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.tick_params(labelsize=min(PRINT, 65 * high))
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False)
    bar = figure.colorbar(
        meshes[0], ax=axes, shrink=0.9, aspect=max(22, 5 * figure.get_figheight()), pad=0.02, extend="max"
    )
    percent(bar.ax.yaxis)
    bar.set_label(f"share of {what}, %")
    bar.outline.set_visible(False)
    return figure


def edges_of(rows: Sequence[Floats], logarithmic: bool, centre: float | None = None) -> Floats:
    """Edges of cells: from the 2 % to the 98 % quantile of all samples, and at least from quartile to quartile of each.

    Beyond them the end cells count: else one extreme value would take most of the axis.

    Args:
        logarithmic: cells of equal ratios. centre: the middle of a cell.
    """
    quartiles = [float(end) for row in rows if len(row) for end in np.quantile(row, (0.25, 0.75))]
    inside = quartiles if centre is None else [*quartiles, centre]
    low, high = (float(end) for end in np.quantile(np.concatenate(rows), (0.02, 0.98)))
    low, high = min(low, *inside), max(high, *inside)
    high = high if high > low else low + 1.0
    if centre is not None:
        # Not the ends of equal parts: rounding would put what is exactly there into the cell on either side.
        width = (high - low) / BINS
        before, after = (int(np.ceil((end - 0.5 * width) / width)) for end in (centre - low, high - centre))
        return np.asarray(centre + width * (np.arange(-before, after + 2) - 0.5), dtype=np.float64)
    if logarithmic and low > 0:
        return np.geomspace(low, high, BINS + 1)
    return np.linspace(low, high, BINS + 1)


def _rows_of_histograms(
    axis: Axes, rows: Sequence[Floats], logarithmic: bool, room: float, centre: float | None
) -> Any:
    """One row of cells a sample, and its median; `room` is about how wide the panel is, in inches."""
    edges = edges_of(rows, logarithmic, centre)
    low, high = float(edges[0]), float(edges[-1])
    shares = np.stack([np.histogram(row.clip(low, high), edges)[0] / max(len(row), 1) for row in rows])
    heights = np.arange(len(rows) + 1) - 0.5
    mesh = axis.pcolormesh(edges, heights, shares, cmap="Greys", vmin=0, vmax=DARKEST, rasterized=True)
    for place, row in enumerate(rows):
        if len(row):
            middle = float(np.median(row))
            axis.plot([middle, middle], [place - 0.42, place + 0.42], color=MEDIAN, linewidth=1.6)
    if logarithmic and low > 0:
        axis.set_xscale("log")
        compact_log(axis.xaxis, log_subs(low, high, room, PRINT))
    return mesh
