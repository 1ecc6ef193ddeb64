"""The contract of every arm: the shipped arms hold it, and each way of breaking it is found by its own check."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmark import registry
from benchmark.cli import app
from benchmark.conformance import decision_checks, examine
from benchmark.conformance_run import run_checks
from benchmark.method import Method

sys.path.insert(0, str(Path(__file__).parent))
broken: Any = importlib.import_module("broken_methods")


def broken_checks(method: Method) -> dict[str, str]:
    return {finding.check: finding.reason for finding in examine(method, decision_checks()) if not finding.holds}


@pytest.mark.parametrize("name", registry.names())
def test_every_arm_holds_the_contract(name: str) -> None:
    assert broken_checks(registry.build(name, {})) == {}


@pytest.mark.parametrize(
    ("cls", "check", "reason"),
    [
        (broken.Thawed, "declaration", "two instances"),
        (broken.Plain, "declaration", "frozen=True"),
        (broken.Adrift, "declaration", "anchor 'reference'"),
        (broken.Wasteful, "allocate", "sum to"),
        (broken.Hoarder, "keep", "without rollouts"),
        (broken.NaNs, "credit", "NaN"),
        (broken.Speechless, "credit", "does not say how"),
        (broken.LogOfZero, "modulate", "NaN or an infinity"),
        (broken.Rememberer, "pure", "credit gives another answer"),
        (broken.Gambler, "pure", "credit gives another answer"),
        (broken.Scribbler, "pure", "credit writes into its argument"),
        (broken.Eraser, "allocate", "read-only"),
        (broken.FirstComeFirstServed, "order", "depends on the order"),
        (broken.Silent, "labels", "it changes allocation"),
    ],
)
def test_every_breach_is_found_by_its_check(cls: type[Method], check: str, reason: str) -> None:
    assert reason in broken_checks(cls())[check]


def test_a_tiny_run_is_booked_repeated_and_resumed(tmp_path: Path) -> None:
    findings = list(examine(registry.build("dynamo", {}), run_checks("dynamo", tmp_path)))
    assert [(finding.check, finding.reason) for finding in findings] == [
        ("train", ""),
        ("books", ""),
        ("repeat", ""),
        ("resume", ""),
    ]


def test_runs_of_a_method_with_a_state_of_its_own_differ_when_resumed(tmp_path: Path) -> None:
    with registry.registered("rememberer", "broken_methods:Rememberer"):
        findings = {f.check: f.reason for f in examine(broken.Rememberer(), run_checks("rememberer", tmp_path))}
    assert findings["repeat"] == ""
    assert "may keep no state" in findings["resume"]


def test_check_prints_a_table_and_exits_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    good = CliRunner().invoke(app, ["check", "grpo", "--no-train"])
    assert good.exit_code == 0
    assert "grpo: 10 of 10 checks hold" in good.stdout
    bad = CliRunner().invoke(app, ["check", "broken_methods:NaNs", "--no-train"])
    assert bad.exit_code == 1
    assert "BROKEN" in bad.stdout
    assert "get NaN or an infinity" in bad.stdout
    told = CliRunner().invoke(app, ["check", "broken_methods:NaNs", "--no-train", "--json"])
    assert told.exit_code == 1
    assert {row["check"] for row in json.loads(told.stdout) if not row["holds"]} == {"credit", "modulate"}


@pytest.mark.parametrize("method", ["grppo", "broken_methods:Nobody", "no_such_module:Method", "broken_methods:np"])
def test_what_is_no_method_is_one_line_and_exit_code_2(method: str) -> None:
    result = CliRunner().invoke(app, ["check", method])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
