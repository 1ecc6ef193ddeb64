"""`rolloutbench compare` against studies whose true differences are known."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from analysis.compare import compare
from analysis.comparisons import Scores
from analysis.results import load_study
from analysis.table_scores import MOST_SEEDS, seeds_for
from benchmark.cli import app

EFFECTS = {"grpo": 0.0, "rloo": 0.0, "dynamo": 0.25, "w_reinforce": -0.25, "never_ran": 0.0}
SLOWNESS = {"dynamo": 1.5}


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


@pytest.fixture(scope="module")
def study(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seeds = range(4)
    absent = {("never_ran", seed): "missing" for seed in seeds} | {("w_reinforce", 3): "failed"}
    recipe = made.Recipe(arms=EFFECTS, seeds=seeds, items=16, points=3, slowness=SLOWNESS, unfinished=absent)
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "made_up", recipe)
    return folder


def ask(study: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments, "--results", str(study)])


def final_means(study: Path, arm: str, seeds: Sequence[int]) -> list[float]:
    """Mean accuracy of every seed straight from the records; families have the same number of items here."""
    means = []
    for seed in seeds:
        (cell,) = (study / "cells").glob(f"{arm}-s{seed}-*")
        rows = [json.loads(line) for line in (cell / "evaluation.jsonl").read_text().splitlines()]
        means.append(float(np.mean([row["c"] / row["n"] for row in rows if row["final"]])))
    return means


@pytest.mark.parametrize("pair", [("dynamo", "grpo"), ("grpo", "dynamo")])
def test_the_better_arm_is_named_whichever_comes_first(study: Path, pair: tuple[str, str]) -> None:
    result = ask(study, *pair)
    assert result.exit_code == 0
    own, other = (final_means(study, arm, range(4)) for arm in ("dynamo", "grpo"))
    gain = f"{100 * (np.mean(own) - np.mean(other)):.1f}"
    assert result.stdout.startswith(f"dynamo is better than grpo by {gain} points of pass@1 (95 % interval [")
    assert "paired over 4 seeds and 48 problems" in result.stdout
    assert "not adjusted for other comparisons" in result.stdout
    assert "both spent 800,000 generated tokens a run" in result.stdout
    assert "dynamo at 1.00 times the FLOPs and 1.50 times the device seconds of grpo" in result.stdout
    low, high = (float(end) for end in re.findall(r"interval \[([\d.]+), ([\d.]+)\]", result.stdout)[0])
    assert 0 < low < float(gain) < high
    assert len(result.stdout.splitlines()) == 1


def test_a_worse_arm_costs_what_it_costs(study: Path) -> None:
    line = ask(study, "w_reinforce", "dynamo").stdout
    assert line.startswith("dynamo is better than w_reinforce by ")
    assert "paired over 3 seeds" in line  # one seed of w_reinforce failed
    assert "dynamo at 1.00 times the FLOPs and 1.50 times the device seconds of w_reinforce" in line


def test_what_cannot_be_told_is_called_inconclusive_with_what_it_would_take(study: Path) -> None:
    line = ask(study, "rloo", "grpo").stdout
    assert line.startswith("Inconclusive: rloo minus grpo is ")
    found = compare(study, "rloo", "grpo")
    assert found.winner is None
    assert f"could have found (80 % power) is {100 * found.difference.detectable():.1f} points" in line
    assert found.seeds_needed is not None
    assert found.seeds_needed > 4
    assert f"would take about {found.seeds_needed} seeds" in line


def test_seeds_needed_are_the_fewest_that_get_there(study: Path) -> None:
    d = compare(study, "rloo", "grpo").difference
    assert seeds_for(d.detectable() * 1.0001, [d]) == d.seeds  # as many as there are for what is detectable now
    smaller = seeds_for(d.detectable() / 2, [d])
    assert smaller is None or smaller > d.seeds
    assert seeds_for(1e-6, [d]) is None


def test_one_seed_never_decides(made: ModuleType, tmp_path: Path) -> None:
    recipe = made.Recipe(arms={"grpo": 0.0, "dynamo": 0.3}, seeds=(0,), items=16, points=2)
    line = ask(made.make_study(tmp_path / "one", recipe), "dynamo", "grpo").stdout
    assert line.startswith("Inconclusive: ")
    assert "one seed cannot tell luck from effect" in line


def test_problems_can_be_what_is_short(study: Path) -> None:
    from dataclasses import replace

    found = compare(study, "rloo", "grpo")
    crowded = replace(found.difference, seed_sd=0.0)  # all doubt comes from the problems
    stuck = replace(found, difference=crowded, effect=1e-3, seeds_needed=seeds_for(1e-3, [crowded]))
    assert f"{MOST_SEEDS} seeds would not find" in stuck.sentence()
    assert "more problems" in stuck.sentence()


def test_the_numbers_are_those_of_the_report(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison.json"
    result = ask(study, "dynamo", "grpo", "--metric", "pass_at_8", "--json", str(out))
    record: dict[str, Any] = json.loads(out.read_text())
    scores = Scores(load_study(study))
    expected = scores.differences([("dynamo", "grpo")], "pass_at_8")[0]
    assert (record["mean"], record["low"], record["high"], record["p"]) == (
        expected.mean,
        expected.low,
        expected.high,
        expected.p,
    )
    assert record["sentence"] == result.stdout.strip()
    assert record["winner"] == "dynamo"
    assert record["adjusted"] is False


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dynmo", "grpo"], "Did you mean dynamo?"),
        (["dynamo", "never_ran"], "Run what is missing: rolloutbench study made_up"),
        (["dynamo", "dynamo"], "Name two arms"),
        (["dynamo", "grpo", "--metric", "pass_at_512"], "Choose one of pass_at_1, pass_at_8, pass_at_32"),
        (["dynamo", "grpo", "--metric", "accuracy"], "Metrics are pass_at_<k>"),
    ],
)
def test_errors_say_what_to_do_next(study: Path, arguments: list[str], told: str) -> None:
    result = ask(study, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_a_study_the_command_that_makes_one_is_named(tmp_path: Path, study: Path) -> None:
    result = ask(tmp_path / "main_table", "dynamo", "grpo")
    assert result.exit_code == 2
    assert "rolloutbench study main_table" in result.stderr
    alone = tmp_path / "apart"
    shutil.copytree(study, alone)
    for cell in (alone / "cells").glob("dynamo-s[01]-*"):
        shutil.rmtree(cell)
    for cell in (alone / "cells").glob("grpo-s[23]-*"):
        shutil.rmtree(cell)
    result = ask(alone, "dynamo", "grpo")
    assert result.exit_code == 2
    assert "no finished seed in common" in result.stderr
