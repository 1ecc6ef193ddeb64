"""The measured gradient variance of allocators as tables: one for a study's report, the rest for the variance study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.formatting import MISSING
from analysis.tables import Column, Table, Text
from analysis.variance_allocators import LABELS, NAMES, RULES

_KEYS = ("allocator", "advantage", "ratio", "low", "high")


def variance_table(record: Mapping[str, Any]) -> Table:
    """Ratio of every allocator's gradient variance to uniform's, one row an allocator and advantage.

    Args:
        record: ``gradient_variance.json``: checkpoint, and rows of allocator, advantage, ratio, low, high.
    """
    data = pd.DataFrame([{key: row.get(key) for key in _KEYS} for row in record["rows"]], columns=list(_KEYS))
    numbers = data[["ratio", "low", "high"]].astype(float)
    rows = [
        [Text(str(allocator).replace("_", " ")), Text(str(advantage)), *map(Text, _ratio(*values))]
        for allocator, advantage, values in zip(
            data["allocator"], data["advantage"], numbers.itertuples(index=False), strict=True
        )
    ]
    columns = [Column("allocation", left=True), Column("advantage", left=True)]
    checkpoint = str(record.get("checkpoint", "one checkpoint"))
    notes = [
        f"Trace of the covariance of the whole gradient estimate at equal draws, relative to uniform allocation, "
        f"95 % interval; measured on {checkpoint}. Below 1 is better."
    ]
    return Table(
        "gradient_variance",
        "Gradient variance of allocations",
        [*columns, Column("ratio to uniform"), Column("95 % interval")],
        rows,
        data,
        notes,
    )


def _ratio(ratio: float, low: float, high: float) -> tuple[str, str]:
    known = math.isfinite(low) and math.isfinite(high)
    return f"{ratio:.3f}", f"[{low:.3f}, {high:.3f}]" if known else MISSING


def ratio_table(frame: pd.DataFrame, checkpoint: str) -> Table:
    """Ratio to uniform of every allocator at one checkpoint, a column an advantage and budget.

    Args:
        frame: rows of `analysis.variance_replay.replay`; all of them go to the CSV file.
    """
    mine = frame[(frame["checkpoint"] == checkpoint) & (frame["coordinates"] == "gradient")]
    kinds, budgets = list(dict.fromkeys(mine["advantage"])), sorted(set(mine["budget"]))
    cells = lookup(mine, "allocator", "advantage", "budget")
    best = {(kind, budget): _best_rule(cells, kind, budget) for kind in kinds for budget in budgets}
    rows = []
    for name in NAMES:
        shown = [Text(LABELS[name])]
        for (kind, budget), winner in best.items():
            row = cells[name, kind, budget]
            half = (row["high"] - row["low"]) / 2
            text = f"{row['ratio']:.3f}" if half == 0 else f"{row['ratio']:.3f} ± {half:.3f}"
            shown.append(Text(text, bold=name == winner))
        rows.append(shown)
    columns = [Column(str(budget), group=kind) for kind in kinds for budget in budgets]
    notes = [
        f"Trace of the gradient's covariance at fixed prompts relative to uniform allocation, {checkpoint}, by "
        "advantage and rollouts per prompt; ± half a 95 % interval. Below 1 is better; bold: the best rule (oracles "
        "are limits)."
    ]
    title = "Gradient variance of allocators relative to uniform"
    return Table("variance", title, [Column("allocation", left=True), *columns], rows, frame, notes)


def lookup(frame: pd.DataFrame, *keys: str) -> dict[Any, dict[str, Any]]:
    """The rows of a frame by the values of `keys`: tuples, or single values of a single key."""
    return {
        row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys): row
        for row in map(_plain_keys, frame.to_dict("records"))
    }


def _plain_keys(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items()}


def _best_rule(cells: Mapping[Any, Mapping[str, Any]], kind: str, budget: int) -> str:
    return min(RULES, key=lambda name: float(cells[name, kind, budget]["ratio"]))


def training_table(frame: pd.DataFrame, budget: int) -> Table:
    """Along training: share within prompts, signal-to-noise, what the oracle and the rules reach, by advantage."""
    mine = frame[(frame["budget"] == budget) & (frame["coordinates"] == "gradient")]
    shown = [name for name in NAMES if name != "uniform"]
    rows, data = [], []
    for (checkpoint, advantage), part in mine.groupby(["checkpoint", "advantage"], sort=False):
        own = lookup(part, "allocator")
        uniform = own["uniform"]
        rows.append(
            [
                Text(str(checkpoint)),
                Text(str(advantage)),
                Text(_with_half(uniform, "within_share", 2)),
                Text(_with_half(uniform, "signal_to_noise", 2)),
                *(Text(f"{own[name]['ratio']:.3f}") for name in shown),
            ]
        )
        head = {"checkpoint": checkpoint, "advantage": advantage, "budget": budget}
        keep = {key: uniform[key] for key in ("within_share", "signal_to_noise", "variance")}
        data.append(head | keep | {name: own[name]["ratio"] for name in shown})
    columns = [
        Column("checkpoint", left=True),
        Column("advantage", left=True),
        Column("within prompts", group="uniform"),
        Column("signal to noise", group="uniform"),
        *(Column(name.replace("_", " "), group="ratio to uniform") for name in shown),
    ]
    notes = [
        f"{budget} rollouts per prompt. Within prompts: share of the variance over batches of prompts that the "
        "rollouts cause, all that allocation can change; ± half a 95 % interval over prompts."
    ]
    return Table("variance_training", "Gradient variance along training", columns, rows, pd.DataFrame(data), notes)


def _with_half(row: Mapping[str, Any], name: str, digits: int) -> str:
    half = (float(row[f"{name}_high"]) - float(row[f"{name}_low"])) / 2
    return f"{float(row[name]):.{digits}f} ± {half:.{digits}f}"


def proxy_table(proxies: pd.DataFrame) -> Table:
    """How well p (1 - p) explains the variance of prompts, by checkpoint, coordinates and advantage."""
    rows = [
        [
            *(Text(str(row[key])) for key in ("checkpoint", "coordinates", "advantage")),
            Text(f"{row['r_squared']:.2f}"),
            Text(f"[{row['r_squared_low']:.2f}, {row['r_squared_high']:.2f}]"),
            Text(f"{row['slope']:.2f}"),
            Text(str(row["prompts"])),
        ]
        for row in proxies.to_dict("records")
    ]
    columns = [*(Column(name, left=True) for name in ("checkpoint", "coordinates", "advantage"))]
    columns += [Column("R²"), Column("95 % interval"), Column("slope"), Column("prompts")]
    notes = ["Regression of log V_i on log p (1 - p) over prompts; the law V ~ p (1 - p) has slope 1 and R² near 1."]
    return Table("variance_proxy", "Does p (1 - p) predict a prompt's variance?", columns, rows, proxies, notes)


def coordinates_table(frame: pd.DataFrame, checkpoint: str, budget: int) -> Table:
    """Ratio to uniform and direction in each system of coordinates at one checkpoint and budget."""
    mine = frame[(frame["checkpoint"] == checkpoint) & (frame["budget"] == budget)]
    kinds, systems = list(dict.fromkeys(mine["advantage"])), list(dict.fromkeys(mine["coordinates"]))
    cells = lookup(mine, "allocator", "advantage", "coordinates")
    quality = {"signal_ratio": "signal to noise", "cosine": "cosine"}
    rows = [
        [
            Text(LABELS[name]),
            *(Text(f"{cells[name, kind, system]['ratio']:.3f}") for kind in kinds for system in systems),
            *(Text(f"{cells[name, kind, 'gradient'][key]:.3f}") for key in quality for kind in kinds),
        ]
        for name in NAMES
    ]
    columns = [Column(system, group=kind) for kind in kinds for system in systems]
    columns += [Column(kind, group=title) for title in quality.values() for kind in kinds]
    notes = [
        f"{checkpoint}, {budget} rollouts per prompt. adam: the update preconditioned with the run's second moments. "
        "Signal to noise: squared mean over variance, relative to uniform, since an allocation may also lower the "
        "variance by shrinking the gradient. Cosine: of the expected gradient to that of groups of a whole pool; one "
        "minus it is the bias of direction."
    ]
    title = "The same for the preconditioned update and the last layer alone"
    columns = [Column("allocation", left=True), *columns]
    return Table("variance_coordinates", title, columns, rows, mine, notes)
