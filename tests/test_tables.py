"""Reading a results folder, the numbers and forms of its tables, and the answers to claims."""

from __future__ import annotations

import importlib
import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import formatting
from analysis.claims import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, Answer, decide
from analysis.comparisons import AVERAGE, Difference, Scores
from analysis.results import load_study
from analysis.spending import at_equal_amount, smallest_spend, target_estimate
from analysis.statistics import holm, pass_at_k
from analysis.summary import headline
from analysis.table_changes import changes_table
from analysis.table_scores import detectable_sentence, differences_table, family_table, main_table
from analysis.table_spend import cost_table, ranking_table, rollouts_table, seconds_table, spend_table
from analysis.tables import Column, Table, Text, latex_text
from benchmark.errors import InputError

ARMS = {"grpo": 0.0, "rloo": 0.0, "dapo": 0.15, "dynamo": 0.2, "w_reinforce": -0.2}


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


def recipe(made: ModuleType, **changes: Any) -> Any:
    settings = {"arms": ARMS, "seeds": (0, 1, 2), "items": 10, "points": 4, "steps": 12, "final_samples": 32}
    return made.Recipe(**{**settings, **changes})


@pytest.fixture(scope="module")
def folder(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = made.make_study(tmp_path_factory.mktemp("results") / "made_up", recipe(made))
    return path


@pytest.fixture(scope="module")
def scores(folder: Path) -> Scores:
    return Scores(load_study(folder))


def rows_of(folder: Path, arm: str, seed: int) -> list[dict[str, Any]]:
    (cell,) = (folder / "cells").glob(f"{arm}-s{seed}-*")
    return [json.loads(line) for line in (cell / "evaluation.jsonl").read_text().splitlines()]


def all_tables(scores: Scores) -> list[Table]:
    pairs = [(arm, "grpo") for arm in scores.study.arms if arm != "grpo"]
    found = [d for metric in scores.study.metrics for d in scores.differences(pairs, metric)]
    makers = (main_table, cost_table, ranking_table, spend_table, rollouts_table, seconds_table)
    primary = [d for d in found if d.metric == "pass_at_1"]
    return [*(make(scores) for make in makers), differences_table(scores, primary), family_table(scores, found)]


# -- reading


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    study = load_study(folder)
    assert study.problems == ()
    assert study.arms == list(ARMS)
    assert study.families == ["sum_short", "sum_long", "products"]
    assert study.metrics == ["pass_at_1", "pass_at_8", "pass_at_32"]
    assert len(study.evaluations) == 5 * 3 * 4 * 30
    assert study.versions["torch"] == ["2.13.0"]
    for row in rows_of(folder, "dapo", 1)[::37]:
        mine = study.evaluations.query("arm == 'dapo' and seed == 1")
        found = mine[(mine["point"] == row["point"]) & (mine["item"] == row["item"])]
        assert found[["n", "c"]].to_numpy().tolist() == [[row["n"], row["c"]]]


def test_seconds_of_a_point_are_those_of_the_steps_before_it(folder: Path, made: ModuleType) -> None:
    points: Any = load_study(folder).points.query("arm == 'grpo' and seed == 0")
    total = sum(made.PHASES.values())
    np.testing.assert_allclose(points["device_seconds"], total * points["step"] / 12)
    assert points["device_seconds"].iloc[-1] == pytest.approx(total)


def _edit_result(cell: Path, **changes: Any) -> None:
    result = json.loads((cell / "result.json").read_text())
    (cell / "result.json").write_text(json.dumps(result | changes))


def _drop_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("spoil", "said", "counts"),
    [
        (lambda c: _edit_result(c, run_hash="other"), "its result belongs to another configuration", False),
        (lambda c: _drop_line(c / "evaluation.jsonl"), "29 of 30 items were evaluated", False),
        (lambda c: (c / "evaluation.jsonl").write_text(""), "it has no final evaluation", False),
        (lambda c: (c / "result.json").unlink(), "grpo seed 0 (it has no result.json)", False),
        (lambda c: _edit_result(c, overshoot=-5), "grpo seed 0 ended -5 away from its budget", True),
        (lambda c: _edit_result(c, drawn={"trained": 1}), "drew 1 rollouts by their fates but was charged", True),
        (lambda c: _edit_result(c, planned={"rollouts": 7}), "different currencies of the budget", True),
    ],
    ids=["hash", "item", "evaluation", "result", "budget", "fates", "currency"],
)
def test_what_is_wrong_with_a_cell_is_said(
    made: ModuleType, tmp_path: Path, spoil: Any, said: str, counts: bool
) -> None:
    folder = made.make_study(tmp_path / "study", recipe(made, arms={"grpo": 0.0, "rloo": 0.0}, seeds=(0, 1)))
    spoil(folder / "cells" / "grpo-s0-0123abcd")
    study = load_study(folder)
    assert any(said in problem for problem in study.problems), study.problems
    assert (0 in set(study.done.query("arm == 'grpo'")["seed"])) is counts
    assert Scores(study).seeds("grpo", "rloo") == ([0, 1] if counts else [1])


def test_a_damaged_record_is_refused_with_its_line(made: ModuleType, tmp_path: Path) -> None:
    folder = made.make_study(tmp_path / "study", recipe(made, arms={"grpo": 0.0}, seeds=(0,)))
    path = folder / "cells" / "grpo-s0-0123abcd" / "metrics.jsonl"
    path.write_text(path.read_text() + "{half\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:13"):
        load_study(folder)


def test_a_study_without_a_finished_cell_is_refused(made: ModuleType, tmp_path: Path) -> None:
    unfinished = {("grpo", 0): "failed", ("grpo", 1): "running"}
    folder = made.make_study(tmp_path / "s", recipe(made, arms={"grpo": 0}, seeds=(0, 1), unfinished=unfinished))
    with pytest.raises(InputError, match=r"no cell is done \(failed, running\)"):
        load_study(folder)


def test_a_metric_beyond_the_samples_is_refused(made: ModuleType, tmp_path: Path) -> None:
    claim = {"id": "c", "text": "", "arm": "rloo", "reference": "grpo", "metric": "pass_at_64"}
    folder = made.make_study(tmp_path / "study", recipe(made, arms={"grpo": 0, "rloo": 0}, seeds=(0,), claims=[claim]))
    with pytest.raises(InputError, match=r"pass_at_64.*only 32 samples"):
        load_study(folder)


def test_one_family_is_its_own_average(made: ModuleType, tmp_path: Path) -> None:
    scores = Scores(load_study(made.make_study(tmp_path / "study", recipe(made, families=("sums",)))))
    assert scores.groups == [AVERAGE]
    assert [column.title for column in main_table(scores).columns] == ["arm", "pass@1", "pass@8", "pass@32"]
    assert [d.family for d in scores.differences([("dapo", "grpo"), ("rloo", "grpo")], "pass_at_1")] == [AVERAGE] * 2


# -- numbers


def test_the_main_table_holds_the_means_of_the_records(scores: Scores, folder: Path) -> None:
    data: Any = main_table(scores).data.set_index(["arm", "family", "metric"])
    for arm in ARMS:
        rows = [row for seed in (0, 1, 2) for row in rows_of(folder, arm, seed) if row["final"]]
        frame = pd.DataFrame(rows)
        for k in (1, 8, 32):
            frame["score"] = pass_at_k(frame["n"].to_numpy(), frame["c"].to_numpy(), k)
            by_family: Any = frame.groupby("family")["score"].mean()
            assert data.loc[(arm, AVERAGE, f"pass_at_{k}"), "mean"] == pytest.approx(by_family.mean())
            assert data.loc[(arm, "products", f"pass_at_{k}"), "mean"] == pytest.approx(by_family["products"])
    assert ((data["low"] <= data["mean"]) & (data["mean"] <= data["high"]) & (data["high"] <= 1)).all()


def test_best_is_bold_and_ties_are_those_whose_interval_holds_zero(scores: Scores) -> None:
    table = main_table(scores)
    data = table.data.query("family == 'average' and metric == 'pass_at_1'").set_index("arm")
    best = data["mean"].idxmax()
    column = [column.title for column in table.columns].index("pass@1")
    for row in table.rows:
        arm, cell = row[0].text, row[column]
        assert cell.bold == bool(data.loc[arm, "best"]) == (arm == best)
        tied = scores.estimate(scores.paired((str(best), arm), "pass_at_1"))
        assert cell.tied == bool(data.loc[arm, "tied_with_best"])
        assert cell.tied == (arm != best and bool(tied.low <= 0 <= tied.high))
    assert not data.loc["w_reinforce", "tied_with_best"]


def test_differences_hold_the_effects_that_were_put_in(made: ModuleType, tmp_path: Path) -> None:
    sure = recipe(made, seeds=tuple(range(6)), items=40, points=2, seed_sd=0.005, item_sd=0.02)
    scores = Scores(load_study(made.make_study(tmp_path / "study", sure)))
    found = {d.arm: d for d in scores.differences([(a, "grpo") for a in ARMS if a != "grpo"], "pass_at_1")[::4]}
    for arm, difference in found.items():
        assert difference.family == AVERAGE
        assert difference.low <= ARMS[arm] <= difference.high
        assert difference.high - difference.low < 0.06
    text = headline(scores, list(found.values()))
    above, below = text.index("Clearly above grpo"), text.index("Clearly below grpo")
    assert above < text.index("dynamo (+") < text.index("dapo (+") < below < text.index("w_reinforce (\N{MINUS SIGN}")
    assert "rloo" not in text


def test_equal_runs_say_nothing_about_what_was_detectable() -> None:
    same = Difference("a", "b", "pass_at_1", AVERAGE, 3, 0.0, 0.0, 0.0, 1.0, 1.0, error=0.0, seed_sd=0.0)
    assert math.isnan(same.detectable())
    assert "not known" in detectable_sentence([same])
    other = replace(same, error=0.01, seed_sd=0.01 * math.sqrt(3))
    # 5.65 standard errors with three seeds; the pair that never differs takes no part.
    assert "5.7 points (median over arms" in detectable_sentence([same, other])


def test_holm_is_over_the_cells_of_each_table(scores: Scores) -> None:
    tables = {table.name: table.data for table in all_tables(scores)}
    for name, cells in (("differences", 4), ("differences_by_family", 4 * 4 * 3)):
        data: Any = tables[name]
        assert len(data) == cells
        np.testing.assert_allclose(data["p_holm"], holm(data["p"]))
    own: Any = tables["differences"].set_index("arm")["p"]
    every: Any = (
        tables["differences_by_family"].query("family == 'average' and metric == 'pass_at_1'").set_index("arm")["p"]
    )
    pd.testing.assert_series_equal(own, every)


def test_a_missing_seed_is_left_out_of_pairs_not_filled(made: ModuleType, tmp_path: Path) -> None:
    unfinished = {("rloo", 1): "missing", ("grpo", 2): "failed"}
    folder = made.make_study(tmp_path / "study", recipe(made, unfinished=unfinished))
    scores = Scores(load_study(folder))
    seeds = {d.arm: d.seeds for d in scores.differences([("rloo", "grpo"), ("dapo", "grpo")], "pass_at_1")}
    assert seeds == {"rloo": 1, "dapo": 2}
    expected = [
        np.mean([row["c"] / row["n"] for row in rows_of(folder, arm, 0) if row["final"]]) for arm in ("rloo", "grpo")
    ]
    (first, *_) = scores.differences([("rloo", "grpo")], "pass_at_1")
    assert first.mean == pytest.approx(expected[0] - expected[1])
    assert math.isnan(first.detectable())
    assert set(main_table(scores).data.query("arm == 'rloo'")["seeds"]) == {2}


def test_one_seed_makes_nothing_clear(made: ModuleType, tmp_path: Path) -> None:
    lone = recipe(made, arms={"grpo": 0.0, "dynamo": 0.3}, seeds=(0,), items=40, points=2)
    scores = Scores(load_study(made.make_study(tmp_path / "study", lone)))
    found = scores.differences([("dynamo", "grpo")], "pass_at_1")
    assert found[0].low > 0
    assert found[0].p < 0.05
    assert not any(cell.bold for row in differences_table(scores, found).rows for cell in row)
    assert "Clearly above grpo, after Holm's correction: no arm." in headline(scores, found)


def test_unfinished_cells_are_named_by_reason(made: ModuleType, tmp_path: Path) -> None:
    unfinished = {("rloo", 0): "missing", ("rloo", 2): "missing", ("dapo", 1): "failed", ("dynamo", 1): "interrupted"}
    study = load_study(made.make_study(tmp_path / "study", recipe(made, unfinished=unfinished)))
    assert list(study.problems) == [
        "1 of 15 cells failed: dapo seed 1 (boom).",
        "2 of 15 cells are missing: rloo seed 0, rloo seed 2 (it never ran).",
        "1 of 15 cells were interrupted: dynamo seed 1 (boom).",
    ]


# -- cost


@pytest.fixture(scope="module")
def fast(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """An arm that learns twice as fast as grpo, and one that is its equal but takes twice its seconds."""
    arms = {"grpo": 0.0, "rapid": 0.0, "slow": 0.0, "poor": -0.2}
    quiet = {"seed_sd": 0.0, "item_sd": 0.0, "samples": 64, "final_samples": 64, "points": 25}
    changes = {"arms": arms, "speed": {"rapid": 2.0}, "slowness": {"slow": 2.0}, "steps": 24, **quiet}
    folder = made.make_study(tmp_path_factory.mktemp("results") / "fast", recipe(made, **changes))
    return Scores(load_study(folder))


def test_twice_the_speed_is_half_the_cost(fast: Scores) -> None:
    target = target_estimate(fast, "rapid", "grpo", "tokens_generated")
    assert target is not None
    # 1 - exp(-6 x) = 1 - exp(-3) at half the budget.
    assert float(target.mean) == pytest.approx(400_000, rel=0.06)
    assert 300_000 < target.low <= target.mean <= target.high < 500_000
    rows = {row[0].text: [cell.text for cell in row] for row in cost_table(fast).rows}
    assert rows["poor"][1] == "not reached"
    assert rows["poor"][3] == formatting.MISSING
    data: Any = cost_table(fast).data.set_index("arm")
    assert data.loc["rapid", "area"] > data.loc["grpo", "area"] > data.loc["poor", "area"]
    assert data.loc["grpo", "share_of_budget"] == pytest.approx(1, abs=0.1)


def test_equal_seconds_are_fewer_steps_of_a_slow_arm(fast: Scores, made: ModuleType) -> None:
    limit = smallest_spend(fast, "device_seconds")
    assert limit == pytest.approx(sum(made.PHASES.values()))
    final = float(fast.final("grpo", "pass_at_1").mean())
    np.testing.assert_allclose(at_equal_amount(fast, "grpo", "device_seconds", limit).mean(), final)
    half = at_equal_amount(fast, "grpo", "tokens_generated", 400_000).mean()
    assert at_equal_amount(fast, "slow", "device_seconds", limit).mean() == pytest.approx(half, abs=0.01)
    data: Any = ranking_table(fast).data.set_index(["currency", "arm"])
    assert data.loc[("tokens_generated", "slow"), "mean"] == pytest.approx(final, abs=0.01)
    assert data.loc[("device_seconds", "slow"), "rank"] > data.loc[("device_seconds", "grpo"), "rank"]
    assert data.loc[("device_seconds", "slow"), "high"] < 0
    assert "tokens_scored" not in {currency for currency, _ in data.index}  # nobody spent any


def test_spend_is_conserved_in_the_tables(scores: Scores) -> None:
    fates: Any = rollouts_table(scores).data
    np.testing.assert_allclose(fates["drawn"], fates[["trained", "filtered", "overflow", "failed"]].sum(axis=1))
    spent: Any = spend_table(scores).data
    np.testing.assert_allclose(fates["drawn"], spent["rollouts"])
    assert (spent["spent"] == spent["planned"]).all()
    assert (spent["largest_overshoot"] == 0).all()
    seconds: Any = seconds_table(scores).data
    np.testing.assert_allclose(seconds["training"], spent["device_seconds"])


# -- claims


@pytest.mark.parametrize(
    ("low", "high", "p", "effect", "seeds", "verdict"),
    [
        (0.01, 0.03, 0.01, 0.0, 5, SUPPORTED),
        (0.01, 0.03, 0.05, 0.0, 5, INCONCLUSIVE),  # p after Holm's correction has to be below .05
        (-0.01, 0.03, 0.01, 0.0, 5, INCONCLUSIVE),
        (-0.03, -0.01, 0.9, 0.0, 5, NOT_SUPPORTED),
        (0.01, 0.03, 0.01, 0.02, 5, INCONCLUSIVE),
        (0.021, 0.03, 0.01, 0.02, 5, SUPPORTED),
        (0.001, 0.01, 0.01, 0.02, 5, NOT_SUPPORTED),
        (0.01, 0.03, 0.001, 0.0, 1, INCONCLUSIVE),
    ],
)
def test_claims_are_decided_by_the_rule(
    low: float, high: float, p: float, effect: float, seeds: int, verdict: str
) -> None:
    difference = Difference(
        "a", "b", "pass_at_1", AVERAGE, seeds, (low + high) / 2, low, high, p / 2, 0.0625, 0.01, 0.01
    )
    open_answer = Answer("id", "a beats b", "a", "b", "pass_at_1", effect, difference, holm=p)
    assert decide(open_answer).verdict == verdict
    assert decide(replace(open_answer, difference=None)).verdict == INCONCLUSIVE


# -- forms


def test_latex_is_plain_and_its_rows_have_their_columns(scores: Scores) -> None:
    for table in all_tables(scores):
        text = table.latex()
        assert text.isascii(), {c for c in text if not c.isascii()}
        assert len(re.findall(r"(?<!\\)\{", text)) == len(re.findall(r"(?<!\\)\}", text))
        assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
        assert re.findall(r"(?<![\\{:a-z-])_", re.sub(r"\\label\{.*?\}", "", text)) == []
        parts = re.findall(r"\\begin\{tabular\}\{((?:[lr]|p\{20em\})+)\}(.*?)\\end\{tabular\}", text, re.S)
        assert text.count(r"\begin") == text.count(r"\end") == 1 + len(parts)
        parts = [(columns.replace("p{20em}", "p"), body) for columns, body in parts]
        assert sum(len(columns) - 1 for columns, _ in parts) == len(table.columns) - 1  # each has the rows' names
        for columns, body in parts:
            rows = [line for line in body.splitlines() if line.endswith(r"\\")]
            assert len(rows) >= 1 + len(table.rows)
            for row in rows:
                spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row))
                assert len(re.findall(r"(?<!\\)&", row)) + 1 + spanned == len(columns)


def test_wide_latex_tables_are_broken_between_groups(scores: Scores) -> None:
    table = main_table(scores)
    assert len(scores.groups) == 4
    parts = re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", table.latex(), re.S)
    assert len(parts) == 2
    shown = [re.findall(r"\\multicolumn\{3\}\{c\}\{(.*?)\}", part) for part in parts]
    assert [name.replace("\\_", "_") for part in shown for name in part] == scores.groups
    assert r"\begin{table*}" in table.latex()
    narrow = Table(
        "narrow", "Narrow", [Column("arm", left=True), Column("x")], [[Text("a"), Text("1")]], pd.DataFrame()
    )
    assert r"\begin{table}" in narrow.latex()


def points_high(float_: str) -> float:
    """About how high a float is in an article of two columns at 10 pt, from the lines in it."""
    width = 469.0 if "{table*}" in float_ else 229.5
    caption = re.findall(r"\\caption\{(.*)\}", float_)[0]
    notes = "".join(re.findall(r"\\raggedright (.*)\\par", float_))
    high = 10 + 12 * math.ceil(5 * len(caption) / width) + 3 + 9.5 * math.ceil(4 * len(notes) / width)
    for body in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", float_, re.S):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        texts = [re.sub(r"\\[a-z]+\{?|[{}$^]", "", row).split("&") for row in rows]
        columns = [
            max(map(len, column)) for column in zip(*(t for t in texts if len(t) == len(texts[-1])), strict=True)
        ]
        natural = sum(12 + 3.9 * letters for letters in columns)
        high += 6 + min(1.0, width / natural) * (9.6 * len(rows) + 12)
    return high


@pytest.mark.parametrize(("arms", "families", "expected"), [(13, 4, 1), (38, 4, 3), (70, 1, 2), (150, 2, 7)])
def test_high_latex_tables_go_on_in_floats_that_fit_a_page(arms: int, families: int, expected: int) -> None:
    columns = [Column("arm", left=True)]
    columns += [Column(f"pass@{k}", f"family_{f}") for f in range(families + 1) for k in (1, 8, 32)]
    cells = [Text("-0.3 [-1.5, +1.1]", tied=row % 2 == 0) for row in range(arms) for _ in columns[1:]]
    each = len(columns) - 1
    rows = [(Text(f"arm_of_number_{row}"), *cells[each * row : each * (row + 1)]) for row in range(arms)]
    notes = ("± is half the 95 % interval over seeds and problems.", "†: the difference to the highest has 0 in it.")
    text = Table("high", "What is high", columns, rows, pd.DataFrame(), notes).latex()
    floats = re.findall(r"\\begin\{table\*\}.*?\\end\{table\*\}", text, re.S)
    assert len(floats) == expected
    assert max(points_high(float_) for float_ in floats) < 550
    for place, float_ in enumerate(floats):
        assert re.findall(r"\\caption\{(.*)\}", float_) == ["What is high (continued)" if place else "What is high"]
        assert (r"\addtocounter{table}{-1}" in float_) == (place > 0)
        assert (r"\label{tab:high}" in float_) == (place == 0)
        assert r"$\pm$ is half" in float_
        assert r"$^{\dagger}$: the difference" in float_
        for body in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", float_, re.S):
            assert "pass@8" in body
            assert r"\multicolumn{3}{c}{family\_" in body
    # Every row once in every part, whatever float it stands in.
    parts = len(set(re.findall(r"multicolumn\{3\}\{c\}\{family\\_\d\}.*\\\\", text)))
    named = re.findall(r"^(arm\\_of\\_number\\_\d+) ", text, re.M)
    assert len(named) == parts * arms
    assert Counter(named) == {rf"arm\_of\_number\_{row}": parts for row in range(arms)}


def test_rows_of_several_lines_count_as_many() -> None:
    columns = [Column("claim", left=True), Column("text", left=True)]
    rows = [(Text(f"claim {row}"), Text("a long sentence of the plan " * 12)) for row in range(20)]
    text = Table("long", "Long texts", columns, rows, pd.DataFrame()).latex()
    floats = re.findall(r"\\begin\{(table\*?)\}.*?\\end\{\1\}", text, re.S)
    # Nine lines a row: 180 lines of 9.5 pt, where a page has 550 pt.
    assert 4 <= len(floats) <= 6


def test_latex_spells_out_what_it_would_not_take() -> None:
    assert latex_text("dr_grpo & 5 % #1 {x} ~^\\$") == (
        r"dr\_grpo \& 5 \% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{}\$"
    )
    assert latex_text("\N{MINUS SIGN}1.2 ± 0.3 <0.001") == r"$-$1.2 $\pm$ 0.3 $<$0.001"


def test_a_table_says_the_same_in_every_form(tmp_path: Path) -> None:
    columns = [Column("arm", left=True), Column("pass@1", "average"), Column("pass@8", "average")]
    rows = [[Text("dr_grpo"), Text("61.2 ± 1.0", bold=True), Text("a|b", tied=True)]]
    data = pd.DataFrame({"arm": ["dr_grpo"], "mean": [0.6123456789]})
    table = Table("name", "Title", columns, rows, data, ["A note."])
    assert table.markdown() == (
        "| arm | average pass@1 | average pass@8 |\n| :-- | --: | --: |\n| dr_grpo | **61.2 ± 1.0** | a\\|b† |\n"
    )
    assert r"dr\_grpo & \textbf{61.2 $\pm$ 1.0} & a|b$^{\dagger}$ \\" in table.latex()
    assert r" & \multicolumn{2}{c}{average} \\" in table.latex()
    assert r"\cmidrule(lr){2-3}" in table.latex()
    paths = table.write(tmp_path)
    assert [path.name for path in paths] == ["name.md", "name.csv", "name.tex"]
    assert paths[0].read_text() == f"**Title**\n\n{table.markdown()}\nA note.\n"
    assert paths[1].read_text() == "arm,mean\ndr_grpo,0.6123457\n"


def test_csv_files_hold_the_numbers_of_the_tables(scores: Scores) -> None:
    for table in all_tables(scores):
        frame = pd.read_csv(io.StringIO(table.csv()))
        assert list(frame.columns) == list(table.data.columns)
        for name in frame.select_dtypes("number"):
            np.testing.assert_allclose(frame[name], table.data[name].astype(float), rtol=1e-6)


def test_numbers_look_as_people_write_them() -> None:
    f = formatting
    assert [f.amount(x) for x in (0, 5, 999, 1000, 600_000, 999_999, 1_250_000, 3.14159e12, 0.0123)] == (
        ["0", "5", "999", "1k", "600k", "1M", "1.25M", "3.14T", "0.012"]
    )
    assert [f.points(x, sign=True) for x in (0.0123, -0.0123, 0.0001, -0.0001)] == (
        ["+1.2", "\N{MINUS SIGN}1.2", "0.0", "0.0"]
    )
    assert f.interval(-0.003, 0.021) == "[\N{MINUS SIGN}0.3, +2.1]"
    assert f.plus_minus(0.614, 0.60, 0.64) == "61.4 ± 2.0"
    assert [f.p_value(p) for p in (0.0001, 0.0123, 0.0999, 0.25, 1.0)] == ["<0.001", "0.012", "0.10", "0.25", "1.00"]
    nothing = (f.points(math.nan), f.amount(math.nan), f.exact(math.inf), f.p_value(math.nan), f.interval(math.nan, 1))
    assert set(nothing) == {f.MISSING}
    assert f.exact(800_000) == "800,000"
    assert (f.metric_name("pass_at_8"), f.currency_name("tokens_generated")) == ("pass@8", "generated tokens")


# -- arms by what they change

CHANGES = {
    "grpo": [],
    "rloo": ["advantage"],
    "dapo": ["selection", "advantage", "loss"],
    "dynamo": ["allocation", "token", "loss"],
    "w_reinforce": ["advantage"],
}


def primary(scores: Scores) -> list[Difference]:
    return scores.differences([(arm, "grpo") for arm in scores.study.arms if arm != "grpo"], "pass_at_1")


def planned(scores: Scores, changes: dict[str, list[str]]) -> Scores:
    return Scores(replace(scores.study, plan={**scores.study.plan, "changes": changes}))


def test_arms_stand_under_their_main_change_best_first(scores: Scores) -> None:
    table = changes_table(planned(scores, CHANGES), primary(scores))
    assert table is not None
    assert [(row[0].text, row[1].text, row[2].text) for row in table.rows] == [
        ("dynamo", "rollout allocation", "token, loss"),
        ("dapo", "prompt or group selection", "advantage, loss"),
        ("rloo", "advantage", formatting.MISSING),
        ("w_reinforce", "advantage", formatting.MISSING),
        ("grpo", "none", formatting.MISSING),
    ]
    frame, differences = table.data.set_index("arm"), {d.arm: d for d in primary(scores) if d.family == AVERAGE}
    for arm in ("dynamo", "w_reinforce"):
        assert frame.loc[arm, "difference"] == differences[arm].mean
        assert frame.loc[arm, "mean"] == pytest.approx(frame.loc["grpo", "mean"] + differences[arm].mean)
    # dynamo is far above grpo, w_reinforce far below, rloo neither.
    assert "rollout allocation: 1 above, 0 below, of 1" in table.notes[-1]
    assert "advantage: 0 above, 1 below, of 2" in table.notes[-1]


def test_an_optimiser_counts_as_a_baseline_and_an_old_plan_has_no_such_table(scores: Scores) -> None:
    table = changes_table(planned(scores, {**CHANGES, "rloo": ["optimiser", "token"]}), primary(scores))
    assert table is not None
    assert [row[1].text for row in table.rows if row[0].text == "rloo"] == ["baseline or optimiser"]
    assert changes_table(scores, primary(scores)) is None
