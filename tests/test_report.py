"""The report against results whose truth is known: answers, what is missing, links, bytes, and what figures
show.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from analysis import plotting
from analysis.comparisons import Scores
from analysis.figure_data import (
    band,
    dynamic_arms,
    gap_over_tries,
    learning_curve,
    phase_seconds,
    rollout_shares,
    step_curve,
)
from analysis.figures import ORDER, write_figures
from analysis.figures_curves import pass_at_k
from analysis.figures_forest import differences, final_accuracy
from analysis.palette import ARMS, SPARE, styles
from analysis.report import write_report
from analysis.results import load_study
from benchmark.errors import InputError

EFFECTS = {"grpo": 0.0, "rloo": 0.0, "dynamo": 0.25, "w_reinforce": -0.25}
CLAIMS = [
    {"id": "better", "text": "DynaMO is better.", "arm": "dynamo", "reference": "grpo", "metric": "pass_at_1"},
    {"id": "worse", "text": "W is better.", "arm": "w_reinforce", "reference": "grpo", "metric": "pass_at_1"},
    {"id": "equal", "text": "RLOO is better.", "arm": "rloo", "reference": "grpo", "metric": "pass_at_1"},
    {"id": "much", "arm": "dynamo", "reference": "grpo", "metric": "pass_at_1", "min_effect": 0.9},
]
VARIANCE = {
    "checkpoint": "the warm-up policy",
    "rows": [
        {"allocator": name, "advantage": kind, "ratio": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
        for kind in ("centred", "normalised")
        for name, ratio in (("uniform", 1.0), ("standard_deviation", 0.87))
    ],
}


@pytest.fixture(scope="module")
def made() -> ModuleType:
    folder = str(Path(__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("synthetic_results")


def recipe(made: ModuleType, **changes: Any) -> Any:
    settings = {"arms": EFFECTS, "seeds": (0, 1, 2, 3), "items": 16, "points": 4, "steps": 12}
    return made.Recipe(**{**settings, "claims": CLAIMS, **changes})


@pytest.fixture(scope="module")
def study(made: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study with its report."""
    folder: Path = made.make_study(tmp_path_factory.mktemp("results") / "made_up", recipe(made))
    (folder / "gradient_variance.json").write_text(json.dumps(VARIANCE))
    assert write_report(folder) == folder / "REPORT.md"
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small figures, where a test is about the text."""
    monkeypatch.setattr(plotting, "FORMATS", ("svg", "png"))
    monkeypatch.setitem(plotting._RC, "savefig.dpi", 40)


def text_of(folder: Path) -> str:
    return (folder / "REPORT.md").read_text()


def answers(text: str) -> dict[str, str]:
    return {name: verdict for verdict, name in re.findall(r"^- \*\*([a-z ]+)\*\*: .*?\(`(\w+)`", text, re.M)}


def final_means(folder: Path, arm: str) -> dict[int, float]:
    """pass@1 of every seed straight from the records; families have the same number of items here."""
    means = {}
    for cell in sorted((folder / "cells").glob(f"{arm}-s*")):
        rows = [json.loads(line) for line in (cell / "evaluation.jsonl").read_text().splitlines()]
        seed = json.loads((cell / "result.json").read_text())["seed"]
        means[seed] = float(np.mean([row["c"] / row["n"] for row in rows if row["final"]]))
    return means


def test_every_claim_gets_the_answer_that_was_put_in(study: Path) -> None:
    found = answers(text_of(study))
    assert found == {
        "better": "supported",
        "worse": "not supported",
        "equal": "inconclusive",
        "much": "not supported",
    }


def test_differences_are_those_of_the_records(study: Path) -> None:
    grpo = final_means(study, "grpo")
    for arm in ("dynamo", "w_reinforce", "rloo"):
        own = final_means(study, arm)
        expected = 100 * float(np.mean([own[seed] - grpo[seed] for seed in grpo]))
        shown = f"{expected:+.1f}".replace("-", "\N{MINUS SIGN}")
        assert f"{arm} minus grpo in pass@1: {shown} points, 95 % interval [" in text_of(study)


def test_whatever_the_report_names_is_there(study: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", text_of(study))
    assert len(links) > 40
    assert [link for link in links if not (study / link).is_file()] == []
    for name in ORDER:
        assert f"](figures/{name}.png)" in text_of(study)
        assert all((study / "figures" / f"{name}.{kind}").stat().st_size > 1000 for kind in ("svg", "pdf", "png"))
    stems = {path.stem for path in (study / "tables").iterdir()}
    assert stems >= {"main_table", "differences", "cost_to_target", "ranking_by_currency", "spend", "claims"}
    assert all((study / "tables" / f"{stem}.{kind}").is_file() for stem in stems for kind in ("md", "csv", "tex"))


def test_fonts_are_embedded_as_fonts(study: Path) -> None:
    content = (study / "figures" / "final_accuracy.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content


def test_the_same_records_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(study, again, ignore=shutil.ignore_patterns("tables", "figures", "REPORT.md", "index.html"))
    write_report(again)
    made = {p.relative_to(study): p.read_bytes() for p in study.rglob("*") if p.is_file()}
    same = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert made.keys() == same.keys()
    assert [str(name) for name in made if made[name] != same[name]] == []


def test_files_that_no_longer_apply_are_removed(study: Path, tmp_path: Path, quick: None) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(study, folder)
    (folder / "gradient_variance.json").unlink()
    write_report(folder)
    assert list(folder.glob("*/gradient_variance.*")) == []
    assert "Gradient variance" not in text_of(folder)


def test_a_damaged_variance_record_is_refused(study: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(study, folder)
    for content in ("{", '{"rows": [{"allocator": "uniform"}]}', "[]"):
        (folder / "gradient_variance.json").write_text(content)
        with pytest.raises(InputError, match=r"gradient_variance\.json"):
            write_report(folder)


def test_a_variance_of_another_configuration_is_left_out_and_named(study: Path, tmp_path: Path, quick: None) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(study, folder)
    for plan_hash, shown in (("grpo", True), ("older", False)):  # the made-up plan hash is the arm's name
        (folder / "gradient_variance.json").write_text(json.dumps(VARIANCE | {"plan_hash": plan_hash}))
        text = write_report(folder).read_text()
        assert ("## Gradient variance" in text) == shown
        assert ("measured for another configuration" in text) != shown
        assert (folder / "tables" / "gradient_variance.csv").exists() == shown


def test_missing_and_failed_cells_come_first_and_count_nowhere(made: ModuleType, tmp_path: Path, quick: None) -> None:
    unfinished = {("rloo", 0): "failed", ("dynamo", 1): "missing", ("w_reinforce", 0): "missing"}
    small = recipe(
        made, seeds=(0, 1), points=3, steps=4, items=6, unfinished=unfinished | {("w_reinforce", 1): "missing"}
    )
    folder = made.make_study(tmp_path / "smoke", small)
    plan = json.loads((folder / "plan.json").read_text())
    plan["failures"] = [{"arm": "rloo", "seed": 0, "error": "ValueError: broken today"}]
    (folder / "plan.json").write_text(json.dumps(plan))
    text = write_report(folder).read_text()
    first = text.index("## What to know first")
    assert first < text.index("## Claims") < text.index("## Main table")
    opening = text[first : text.index("## Claims")]
    assert "rloo seed 0 (ValueError: broken today)" in opening
    assert "dynamo seed 1" in opening
    assert "w_reinforce seed 0" in opening
    assert "do not hold the luck of training" in opening
    assert "4 of 8 runs" in text
    assert answers(text) == dict.fromkeys(("better", "worse", "equal", "much"), "inconclusive")
    assert "| w_reinforce |" not in text
    assert "no finished seed in common" in text


def test_a_method_edited_between_its_runs_is_named_first(made: ModuleType, tmp_path: Path, quick: None) -> None:
    folder = made.make_study(tmp_path / "edited", recipe(made, seeds=(0, 1), points=3, steps=4))
    for number, name in enumerate(("rloo", "dynamo", "rloo", "dynamo")):
        cell = sorted((folder / "cells").glob(f"{name}-s{number // 2}*"))[0] / "result.json"
        state = {"method_sha256": "one" if name == "dynamo" else str(number)}
        cell.write_text(json.dumps({**json.loads(cell.read_text()), "code": [state]}))
    text = write_report(folder).read_text()
    told = [line for line in text.splitlines() if "files of the method changed between its runs" in line]
    assert told == ["- rloo: the files of the method changed between its runs, which are compared as one."]


def test_one_seed_decides_nothing_and_says_so(made: ModuleType, tmp_path: Path, quick: None) -> None:
    folder = made.make_study(tmp_path / "one", recipe(made, seeds=(0,), points=3, steps=4))
    text = write_report(folder).read_text()
    assert "There is one seed" in text
    assert "4 arms, 1 seed, " in text
    assert re.findall(r"\b1 (?:seeds|arms|runs|claims|cells|problems|samples|families)\b", text) == []
    assert "over problems only, since there is one seed" in text
    assert set(answers(text).values()) == {"inconclusive"}


def test_arms_that_share_too_few_seeds_with_the_reference_are_named(
    made: ModuleType, tmp_path: Path, quick: None
) -> None:
    unfinished = {("grpo", 0): "missing", ("dynamo", 1): "interrupted"}
    folder = made.make_study(tmp_path / "few", recipe(made, seeds=(0, 1), points=3, steps=4, unfinished=unfinished))
    text = write_report(folder).read_text()
    assert "- dynamo: 0 seeds shared with grpo, so no difference is shown.\n" in text
    assert "- rloo, w_reinforce: 1 seed shared with grpo, so the intervals of the difference are over" in text


def test_without_its_reference_a_study_still_has_a_report(made: ModuleType, tmp_path: Path, quick: None) -> None:
    gone = {("grpo", seed): "missing" for seed in (0, 1)}
    folder = made.make_study(tmp_path / "headless", recipe(made, seeds=(0, 1), unfinished=gone))
    text = write_report(folder).read_text()
    assert "grpo, the reference, has no finished run" in text
    assert not (folder / "figures" / "differences.png").exists()
    assert (folder / "figures" / "final_accuracy.png").exists()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.json"):
        write_report(tmp_path)


def test_learning_curves_are_means_over_seeds_on_the_budget(study: Path) -> None:
    scores = Scores(load_study(study))
    curve = learning_curve(scores, "dynamo")
    means = list(final_means(study, "dynamo").values())
    assert curve.cost[-1] == 800_000
    np.testing.assert_allclose(curve.runs[:, -1], means)
    np.testing.assert_allclose(curve.mean, curve.runs.mean(axis=0))
    assert np.all((curve.low <= curve.mean) & (curve.mean <= curve.high))


def test_of_many_arms_those_that_would_flatten_the_others_have_a_scale_of_their_own(
    made: ModuleType, tmp_path: Path
) -> None:
    far = ("behind_by_far", "ahead_by_far")
    usual = [f"arm_{i}" for i in range(plotting.CROWDED)]
    effects = {"grpo": 0.0, far[0]: -0.6, **dict.fromkeys(usual, 0.01), far[1]: 0.6}
    scores = Scores(load_study(made.make_study(tmp_path / "many", recipe(made, arms=effects, samples=8))))
    with plotting.theme():
        figure = pass_at_k(scores)
        assert figure is not None
        panels = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}
    assert set(panels) == {*usual, *far}
    assert len({panels[arm].get_ylim() for arm in usual}) == 1
    assert len({panels[arm].get_ylim() for arm in (usual[0], *far)}) == 3
    for arm, axis in panels.items():
        gap = gap_over_tries(scores, arm, (1, 2, 4, 8))
        assert axis.get_ylim()[0] < gap.runs.min() < gap.runs.max() < axis.get_ylim()[1]
        at_one = np.mean(list(final_means(tmp_path / "many", arm).values()))
        base = np.mean(list(final_means(tmp_path / "many", "grpo").values()))
        assert gap.mean[0] == pytest.approx(at_one - base)
    # The scale of a row can be read off: its first panel with the common scale has numbers.
    rows = {}
    for arm in usual:
        place = panels[arm].get_subplotspec()
        assert place is not None
        rows.setdefault(place.rowspan.start, panels[arm])
    assert all(axis.yaxis.get_tick_params()["labelleft"] for axis in (*rows.values(), *(panels[arm] for arm in far)))


def test_two_runs_have_no_band() -> None:
    found = band(np.array([0.0, 1.0]), np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert found.mean.tolist() == [1.0, 2.0]
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


def test_step_curves_average_neighbours_within_the_range_of_the_steps(study: Path) -> None:
    loaded = load_study(study)
    curve = step_curve(loaded, "grpo", "policy/entropy_nats")
    assert curve is not None
    values = loaded.steps.loc[loaded.steps["arm"] == "grpo", "policy/entropy_nats"]
    assert values.min() <= curve.mean.min() < curve.mean.max() <= values.max()
    assert step_curve(loaded, "grpo", "policy/not_recorded") is None


def test_rollout_shares_count_every_prompt(study: Path) -> None:
    loaded = load_study(study)
    assert dynamic_arms(loaded) == ["dynamo"]
    edges, values, shares = rollout_shares(loaded, "dynamo", bins=4)
    assert shares.shape == (len(values), len(edges) - 1) == (15, 4)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    rows = loaded.allocation[loaded.allocation["arm"] == "dynamo"]
    mean = (rows["n"] * rows["prompts"]).sum() / rows["prompts"].sum()
    # 12 steps in 4 parts of equal size: the mean over parts is the mean over prompts.
    assert float((values @ shares).mean()) == pytest.approx(mean)


def test_seconds_by_phase_are_means_over_seeds(study: Path, made: ModuleType) -> None:
    seconds = phase_seconds(load_study(study))
    assert list(seconds.index) == list(EFFECTS)
    assert seconds.loc["dynamo", list(made.PHASES)].to_dict() == pytest.approx(made.PHASES)


def test_no_text_is_cut_off(made: ModuleType, tmp_path: Path) -> None:
    """All 14 arms, long names, two seeds: every visible text lies within its figure."""
    folder = made.make_study(tmp_path / "wide", made.Recipe(seeds=(0, 1), items=4, points=3, steps=4))
    scores = Scores(load_study(folder))
    with plotting.theme():
        for figure in (final_accuracy(scores), differences(scores)):
            assert figure is not None
            figure.draw_without_rendering()
            inside = figure.bbox.padded(1.0)
            texts = [text for axis in figure.axes for text in (*axis.texts, *axis.get_yticklabels())]
            assert len(texts) >= 26
            cut = [t.get_text() for t in texts if not inside.contains(*t.get_window_extent().min)]
            cut += [t.get_text() for t in texts if not inside.contains(*t.get_window_extent().max)]
            assert cut == []


def test_figures_leave_the_callers_settings_alone(study: Path, tmp_path: Path, quick: None) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    drawn = write_figures(Scores(load_study(study)), tmp_path)
    assert [figure.name for figure in drawn] == [name for name in ORDER if name != "gradient_variance"]
    assert dict(mpl.rcParams) == before


def test_every_arm_has_its_own_look() -> None:
    looks = [*ARMS.values(), *SPARE]
    assert len({look.colour for look in looks}) == len(looks)
    assert len({(look.marker, look.dash) for look in looks}) == len(looks)


def test_an_arms_look_does_not_depend_on_known_company() -> None:
    alone, together = styles(["mine", "yours"]), styles(["grpo", "mine", "dynamo", "yours"])
    assert together["mine"] == alone["mine"] != together["yours"] == alone["yours"]
    assert together["grpo"] == ARMS["grpo"]
    many = styles([f"arm_{i}" for i in range(len(SPARE) + 3)])
    assert len(many) == len(SPARE) + 3


def test_reading_results_needs_no_plotting_library() -> None:
    code = "import sys, analysis.report; sys.exit('matplotlib' in sys.modules or 'seaborn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
