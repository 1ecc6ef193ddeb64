"""`rolloutbench status`: a running study at a glance, from its files alone (any machine that sees them can look)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from benchmark.cells import read_json, running
from benchmark.errors import InputError
from benchmark.jsonl import read_rows
from benchmark.opening import inside, printable
from benchmark.progress import duration, short

State = Literal["done", "ended", "running", "failed", "stopped", "waiting"]
STATES: tuple[State, ...] = ("done", "ended", "running", "failed", "stopped", "waiting")
"""Ended: the trial of a sweep that the cell belongs to was pruned or diverged before the cell was done."""


@dataclass(frozen=True)
class CellStatus:
    """One cell as its files tell.

    Attributes:
        spent, planned: in the study's primary currency; nothing is planned before the run starts.
        accuracy: pass@1 of its latest evaluation, mean over problems, or None.
        final: whether that is its final evaluation.
        wall_seconds: of a finished run, all its sessions.
        message: what a running cell says of itself, or why it failed.
        group: the arm that a sweep's trial tunes; elsewhere the arm itself.
        log: the output of a failed cell, relative to the study's folder.
    """

    arm: str
    seed: int
    state: State
    spent: int
    planned: int | None
    accuracy: float | None
    final: bool
    wall_seconds: float | None
    message: str
    group: str
    log: str


@dataclass(frozen=True)
class StudyStatus:
    """All cells of a study, at one moment."""

    study: str
    currency: str
    cells: tuple[CellStatus, ...]

    @property
    def counts(self) -> dict[State, int]:
        """Cells by state, every state named."""
        found = Counter(cell.state for cell in self.cells)
        return {state: found[state] for state in STATES}

    @property
    def planned(self) -> int:
        """Budget of all cells; those that have not started count as the mean of the others, ended ones as spent."""
        spent = sum(cell.spent for cell in self.cells if cell.state == "ended")
        open_cells = [cell for cell in self.cells if cell.state != "ended"]
        known = [cell.planned for cell in open_cells if cell.planned is not None]
        return spent + (round(len(open_cells) * sum(known) / len(known)) if known else 0)

    @property
    def spent(self) -> int:
        """What all cells have spent."""
        return sum(cell.spent for cell in self.cells)

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the finished cells, with as many at a time as run now; None before one is finished."""
        done = [cell for cell in self.cells if cell.state == "done" and cell.wall_seconds]
        at_once = self.counts["running"]
        if not done or not at_once:
            return None
        pace = sum(cell.spent for cell in done) / sum(cell.wall_seconds or 0.0 for cell in done)
        return (self.planned - self.spent) / (pace * at_once)


def read_status(folder: Path, plan: dict[str, Any]) -> StudyStatus:
    """The state of every cell that ``plan.json`` in `folder` names."""
    currency = str(plan.get("primary_currency", "tokens_generated"))
    cells = [_read(folder, cell, currency) for cell in plan.get("cells", [])]
    return StudyStatus(str(plan.get("study", folder.name)), currency, tuple(cells))


def _read(study: Path, planned: Mapping[str, Any], currency: str) -> CellStatus:
    folder = inside(study, planned["dir"])
    try:
        return _cell(study, planned, currency)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"a record of the cell lacks what it should hold ({type(error).__name__}: {error})"
        raise InputError(what, file=folder, remedy="Restore it, or delete the cell and run it again") from None


def _cell(study: Path, planned: Mapping[str, Any], currency: str) -> CellStatus:
    folder, job = study / planned["dir"], planned["dir"]
    if "group" in planned:  # a trial fails as a whole, in its own folder
        job = f"trials/{planned['arm']}"
    progress = read_json(folder / "progress.json") or {}
    result, failure = read_json(folder / "result.json"), read_json(study / job / "failure.json")
    if result is not None:
        state: State = "done"
    elif "ended" in planned:
        state = "ended"
    elif running(folder):
        state = "running"
    elif failure is not None and not running(study / job):
        state = "failed"
    else:
        state = "stopped" if progress else "waiting"
    accuracy, final = _latest_accuracy(folder / "evaluation.jsonl")
    spent = progress.get("spent", 0) if result is None else result["spent"][currency]
    return CellStatus(
        planned["arm"],
        planned["seed"],
        state,
        int(spent),
        progress.get("planned"),
        accuracy,
        final,
        None if result is None else result.get("wall_seconds"),
        str(failure["error"]) if state == "failed" and failure else str(progress.get("message", "")),
        planned.get("group", planned["arm"]),
        f"{job}/run.log" if state == "failed" else "",
    )


def _latest_accuracy(file: Path) -> tuple[float | None, bool]:
    rows, _ = read_rows(file)
    if not rows:
        return None, False
    latest = [row for row in rows if row.get("point") == rows[-1].get("point")]
    return sum(row["c"] / row["n"] for row in latest) / len(latest), bool(rows[-1]["final"])


def as_json(status: StudyStatus) -> dict[str, Any]:
    """Totals and cells as plain data."""
    totals = {"study": status.study, "currency": status.currency, "spent": status.spent, "planned": status.planned}
    totals |= {"seconds_left": status.seconds_left, "counts": status.counts}
    return totals | {"cells": [vars(cell) for cell in status.cells]}


def render(status: StudyStatus) -> Group:
    """What the terminal shows: totals, arms, running cells, failures."""
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    unit = {"tokens_generated": "tokens"}.get(status.currency, status.currency)
    share = f" ({100 * status.spent / status.planned:.0f} %)" if status.planned else ""
    left = "" if status.seconds_left is None else f"; about {duration(status.seconds_left)} left"
    head = Text(f"{printable(status.study)}: {counts} of {len(status.cells)} cells; ")
    head.append(f"{short(status.spent)}/{short(status.planned)} {unit}{share}{left}")
    why = dict.fromkeys((c.arm, c.message, c.log) for c in status.cells if c.state == "failed")
    said = [f"failed: {arm}: {message} (see {log})" for arm, message, log in why]
    failed = [Text(printable(line), style="red") for line in said]
    now = [cell for cell in status.cells if cell.state == "running"]
    return Group(head, _arms(status.cells), *([_running(now)] if now else []), *failed)


def _arms(cells: Sequence[CellStatus]) -> Table:
    """A line an arm; of a sweep, a line for all trials of an arm, with the best trial that is whole so far."""
    states = [state for state in STATES if any(cell.state == state for cell in cells)]
    tuning = any(cell.group != cell.arm for cell in cells)
    titles = (*states, "final pass@1, %", *(("best trial", "its pass@1, %") if tuning else ()))
    numbers = [Column(title, justify="right", no_wrap=True) for title in titles]
    table = Table(Column("arm", no_wrap=True), *numbers, box=None)
    for group in dict.fromkeys(cell.group for cell in cells):
        mine = [cell for cell in cells if cell.group == group]
        found = Counter(cell.state for cell in mine)
        row: list[str | Text] = [*(str(found[state] or "") for state in states), _percent(_accuracy(mine))]
        if tuning:
            arms = dict.fromkeys(cell.arm for cell in mine)
            whole = {arm: [cell for cell in mine if cell.arm == arm] for arm in arms}
            means = {arm: _accuracy(of) for arm, of in whole.items() if all(cell.state == "done" for cell in of)}
            best = max(means, key=lambda arm: means[arm] or 0.0, default="")
            row += [Text(printable(best)), _percent(means.get(best))]
        table.add_row(Text(printable(group)), *row)
    return table


def _accuracy(cells: Sequence[CellStatus]) -> float | None:
    final = [cell.accuracy for cell in cells if cell.final and cell.accuracy is not None]
    return sum(final) / len(final) if final else None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _running(cells: Sequence[CellStatus]) -> Table:
    titles = ("running", "spent", "latest pass@1, %", "")
    table = Table(*(Column(title, no_wrap=True) for title in titles), box=None)
    for cell in cells:
        share = f"{100 * cell.spent / cell.planned:.0f} %" if cell.planned else ""
        told = [f"{cell.arm} s{cell.seed}", share, _percent(cell.accuracy), cell.message]
        table.add_row(*(Text(printable(text)) for text in told))  # as it is: brackets are no markup
    return table


def watch(folder: Path, plan: dict[str, Any], seconds: float) -> None:
    """Show the status until every cell is done, or Ctrl-C."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            status = read_status(folder, plan)
            live.update(render(status), refresh=True)
            if status.counts["done"] + status.counts["ended"] == len(status.cells):
                return
            time.sleep(seconds)
