"""What `rolloutbench study --dry-run` prints: cells, what they would cost, and what they could detect."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from analysis.formatting import counted
from benchmark.cells import Cell
from benchmark.compose import Plan, scale_pricing
from benchmark.config import RunConfig
from benchmark.estimate import ASSUMED_SD, Prices, detectable_difference, estimate, paired_sd
from benchmark.pricing import assumptions, closed_form
from benchmark.progress import duration, short
from benchmark.workers import default_workers

COUNTED = ("rollouts", "tokens_generated", "flops")


def show_plan(plan: Plan, folder: Path, workers: int | None) -> None:
    """Print the cells of the study in `folder`, amounts, time with `workers`, and the smallest detectable difference."""
    cells = [Cell.of(folder, config) for config in plan.runs]
    for cell in cells:
        mark = "done" if cell.result() is not None else "to run"
        typer.echo(f"{mark:7}{cell.folder}")
    probe: Callable[[RunConfig], Prices] | None = None
    assumed = scale_pricing(plan.study.scale)
    if assumed is not None:
        probe = partial(closed_form, assumed=assumed)
        typer.echo(assumptions(assumed))
    elif cells and all(cell.result() is None for cell in cells):
        from benchmark.run import measure_unit_prices  # torch

        probe = measure_unit_prices
    how = "measured now" if assumed is None else "in closed form"
    cost, count = estimate(cells, probe, how), workers or default_workers()
    typer.echo(f"{plan.study.study}: {counted(cost.cells, 'cell')}, {cost.missing_cells} to run; {cost.source}")
    for label, amounts in (("all cells", cost.total), ("to run", cost.missing)):
        known = [f"{currency} {short(amounts[currency])}" for currency in amounts if currency in COUNTED]
        unknown = [currency for currency in COUNTED if currency not in amounts]
        hours = f"about {duration(amounts['wall_seconds'] / count)}" if "wall_seconds" in amounts else "unknown time"
        hours += f" with {counted(count, 'worker')}"
        if assumed is not None and "evaluation_tokens" in amounts:
            hours = f"about {amounts['wall_seconds'] / 3600:,.0f} GPU hours"
            known.append(f"{short(amounts['evaluation_tokens'])} tokens more to evaluate")
        disk = f"{short(amounts['disk_bytes'])}B" if "disk_bytes" in amounts else "unknown"
        told = ", ".join(known + [f"{currency} unknown" for currency in unknown])
        typer.echo(f"{label}: {told}; {hours}; disk {disk}")
    sd = paired_sd(cells, plan.study.reference)
    smallest = 100 * detectable_difference(len(plan.study.seeds), sd or ASSUMED_SD)
    source, seeds = "measured" if sd else "assumed", counted(len(plan.study.seeds), "seed")
    typer.echo(
        f"smallest detectable difference in pass@1: {smallest:.1f} points with {seeds} "
        f"(80 % power; paired sd {100 * (sd or ASSUMED_SD):.1f} points, {source})"
    )
