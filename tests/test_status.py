"""`rolloutbench status`: states, spend, pace and accuracy from a study's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmark.cells import claim
from benchmark.cli import app
from benchmark.jsonl import append_rows, atomic_write_json
from benchmark.status import StudyStatus, read_status, render

ARMS, SEEDS = ("grpo", "rloo", "dynamo"), (0, 1)
PLAN: dict[str, Any] = {
    "study": "main_table",
    "primary_currency": "tokens_generated",
    "cells": [{"arm": a, "seed": s, "dir": f"cells/{a}-s{s}"} for s in SEEDS for a in ARMS],
}


def evaluated(cell: Path, point: int, right: list[int], final: bool) -> None:
    rows = [{"point": point, "final": final, "item": f"sum/{i}", "n": 10, "c": c} for i, c in enumerate(right)]
    append_rows(cell / "evaluation.jsonl", rows)


def progress(cell: Path, spent: int, message: str = "step 4") -> None:
    atomic_write_json(cell / "progress.json", {"planned": 1000, "spent": spent, "message": message})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two done, one running here, one whose process died, one failed, one not begun."""
    atomic_write_json(tmp_path / "plan.json", PLAN)
    cells = {name: tmp_path / "cells" / name for name in ("grpo-s0", "grpo-s1", "rloo-s0", "rloo-s1", "dynamo-s0")}
    for cell in cells.values():
        cell.mkdir(parents=True)
        evaluated(cell, 0, [1, 1], final=False)
    for name, right in (("grpo-s0", [6, 8]), ("grpo-s1", [5, 7])):
        evaluated(cells[name], 1, right, final=True)
        progress(cells[name], 1000)
        atomic_write_json(cells[name] / "result.json", {"spent": {"tokens_generated": 1000}, "wall_seconds": 50.0})
    progress(cells["rloo-s0"], 500)
    evaluated(cells["rloo-s0"], 1, [3, 4], final=False)
    progress(cells["rloo-s1"], 250)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lease = claim(cells["rloo-s1"])
    assert lease is not None
    holder = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps(holder | {"pid": int(dead.stdout)}))
    atomic_write_json(cells["dynamo-s0"] / "failure.json", {"invocation": "x", "error": "NumericalError: loss nan"})
    return tmp_path


def status_of(folder: Path) -> StudyStatus:
    lease = claim(folder / "cells" / "rloo-s0")
    assert lease is not None
    with lease:
        return read_status(folder, PLAN)


def test_every_state_is_told_apart(folder: Path) -> None:
    status = status_of(folder)
    states = {(cell.arm, cell.seed): cell.state for cell in status.cells}
    assert states == {
        ("grpo", 0): "done",
        ("rloo", 0): "running",
        ("dynamo", 0): "failed",
        ("grpo", 1): "done",
        ("rloo", 1): "stopped",
        ("dynamo", 1): "waiting",
    }
    assert status.counts == {"done": 2, "ended": 0, "running": 1, "failed": 1, "stopped": 1, "waiting": 1}


def test_spend_pace_and_accuracy(folder: Path) -> None:
    status = status_of(folder)
    assert (status.spent, status.planned) == (2750, 6000)
    # 20 tokens a second in finished runs, one run at a time.
    assert status.seconds_left == pytest.approx(3250 / 20)
    found = {(cell.arm, cell.seed): (cell.accuracy, cell.final) for cell in status.cells}
    assert found["grpo", 0] == (pytest.approx(0.7), True)
    assert found["rloo", 0] == (pytest.approx(0.35), False)
    assert found["dynamo", 1] == (None, False)


def test_no_pace_is_invented(folder: Path) -> None:
    assert read_status(folder, PLAN).seconds_left is None  # nothing runs
    for name in ("grpo-s0", "grpo-s1"):
        (folder / "cells" / name / "result.json").unlink()
    assert status_of(folder).seconds_left is None  # nothing is finished


def test_what_the_terminal_shows(folder: Path) -> None:
    console = Console(width=120, file=open(os.devnull, "w"), record=True)  # noqa: SIM115, PTH123
    console.print(render(status_of(folder)))
    shown = console.export_text()
    assert "2 done, 1 running, 1 failed, 1 stopped, 1 waiting of 6 cells; 2.75k/6k tokens (46 %)" in shown
    assert "65.0" in shown
    assert "rloo s0" in shown
    assert "NumericalError: loss nan" in shown


def test_the_command(folder: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    found = json.loads(runner.invoke(app, ["status", str(folder), "--json"]).stdout)
    assert found["counts"]["done"] == 2
    assert len(found["cells"]) == 6
    assert "main_table" in runner.invoke(app, ["status", str(folder)]).stdout
    missing = runner.invoke(app, ["status", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "no plan.json" in missing.output
