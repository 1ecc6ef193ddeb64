"""Figures beyond the report's: what they show against truth that is known, and their files at paper sizes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from analysis import figures_histograms as histograms
from analysis import figures_paper as paper
from analysis.captions import READING, SWEEP
from analysis.comparisons import Scores
from analysis.figures import paper_figures, write_paper_figures
from analysis.notebook import sweep_figures
from analysis.palette import ARMS, FILLS, PHASES, SPARE
from analysis.plotting import COLUMNS, PAPER_HEIGHT, theme
from analysis.results import load_study, only
from analysis.statistics import family_weights
from analysis.table_difficulty import UPPER_ENDS, difficulty_bins, difficulty_table
from benchmark.errors import InputError

sys.path.append(str(Path(__file__).parent))
ROOT = Path(__file__).parent.parent
synthetic: Any = importlib.import_module("synthetic_results")


NAMES = {"final_accuracy", "differences", "learning_curves", "pass_at_k", "entropy_and_gradient_norm"}
NAMES |= {"rollouts_per_prompt", "spend_by_phase", "difficulty", "performance_profiles", "probability_of_improvement"}
NAMES |= {"pareto", "step_histograms"}  # gradient_variance is made only where it was measured


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    recipe = synthetic.Recipe(
        arms={"grpo": 0.0, "dapo": 0.03, "dynamo": 0.2}, seeds=(0, 1, 2), items=24, speed={"dapo": 2.0}
    )
    return Scores(load_study(synthetic.make_study(tmp_path_factory.mktemp("study"), recipe)))


def test_bins_hold_every_problem_by_its_success_before_training(scores: Scores) -> None:
    bins, before = difficulty_bins(scores)
    assert len(bins) == len(scores.items)
    assert set(before[bins == 0]) <= {0.0}
    assert all(0.5 < value <= 0.75 for value in before[bins == 3])
    assert set(bins) <= set(range(len(UPPER_ENDS)))


def test_the_difficulty_figure_says_paired_differences(scores: Scores) -> None:
    bins, _ = difficulty_bins(scores)
    with theme():
        figure = paper.difficulty(scores)
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    first = min(set(bins.tolist()))
    expected = 100 * scores.paired(("dynamo", "grpo"), "pass_at_1")[:, bins == first].mean()
    columns = len(figure.axes[0].get_xticklabels())
    shown = texts[2 * columns].replace("\N{MINUS SIGN}", "-")  # rows: grpo's level, dapo, dynamo
    assert float(shown) == pytest.approx(expected, abs=0.051)
    counts = [int(n) for label in figure.axes[0].get_xticklabels() for n in re.findall(r"n = (\d+)", label.get_text())]
    assert sum(counts) == len(scores.items)


def test_the_difficulty_table_adds_up_to_the_mean_over_problems(scores: Scores) -> None:
    """Bins divide the problems: weighted by their size, level and differences are those over all problems."""
    data = difficulty_table(scores).data
    final = {arm: scores.final(arm, "pass_at_1").mean() for arm in scores.study.arms}
    for arm, own in data.groupby("arm"):
        assert own["problems"].sum() == len(scores.items)
        mean = float((own["mean"] * own["problems"]).sum() / len(scores.items))
        expected = final[arm] - (0 if arm == "grpo" else final["grpo"])
        assert mean == pytest.approx(float(expected), abs=1e-9)
        assert (own["low"] <= own["mean"]).all()
        assert (own["mean"] <= own["high"]).all()


def test_a_profile_falls_from_everything_and_its_area_is_the_mean(scores: Scores) -> None:
    thresholds = np.arange(0, scores.study.samples + 1) / scores.study.samples
    profile = paper.profile(scores, "dapo", thresholds)
    assert profile[0] == pytest.approx(1.0)
    assert (np.diff(profile) <= 1e-12).all()
    mean = float((scores.final("dapo", "pass_at_1") @ family_weights(scores.families)).mean())
    assert profile[1:].mean() == pytest.approx(mean)  # E[X] = sum of P(X >= k / n) / n


def test_the_front_is_what_nothing_beats_in_both() -> None:
    cost, accuracy = [3.0, 1.0, 2.0, 2.0, 4.0], [0.7, 0.5, 0.6, 0.65, 0.7]
    assert paper.front(cost, accuracy) == [1, 3, 0]
    rng = np.random.default_rng(0)
    xs, ys = rng.random(50).tolist(), rng.random(50).tolist()
    beaten = {
        i
        for i in range(50)
        for j in range(50)
        if xs[j] <= xs[i] and ys[j] >= ys[i] and (xs[j], ys[j]) != (xs[i], ys[i])
    }
    assert set(paper.front(xs, ys)) == set(range(50)) - beaten


@pytest.fixture(scope="module")
def written(scores: Scores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    shown = write_paper_figures(paper_figures(scores), folder, "x", wide=("learning_curves",))
    assert {path.name for path in shown} == {f"x_{name}_double.png" for name in NAMES}
    return folder


def test_every_figure_is_written_at_both_widths_with_embedded_fonts(written: Path) -> None:
    assert not list(written.glob("x_learning_curves_single.*"))
    for name in NAMES - {"learning_curves"}:
        for column, width in COLUMNS.items():
            file = written / f"x_{name}_{column}.pdf"
            content = file.read_bytes()
            assert b"/FontFile2" in content, "TrueType fonts are embedded"
            assert b"/Type3" not in content
            box = re.search(rb"/MediaBox \[ ?([\d. ]+)\]", content)
            assert box is not None
            assert float(box[1].split()[2]) == pytest.approx(72 * width, abs=0.5)
            assert file.with_suffix(".svg").stat().st_size > 1000


def test_every_written_figure_has_a_caption_that_says_how_to_read_it(written: Path, field: Scores) -> None:
    stems = {path.stem for path in written.glob("*.pdf")}
    captions = {path.name.removesuffix(".caption.txt"): path.read_text() for path in written.glob("*.caption.txt")}
    assert captions.keys() == stems
    assert "bars are 95 % intervals over seeds" in captions["x_pareto_single"]
    assert "bands are 95 % intervals over seeds" in captions["x_learning_curves_double"]
    for name in ("step_histograms",):
        assert "orange tick is the median" in captions[f"x_{name}_single"]
        assert "collect what lies beyond" in captions[f"x_{name}_single"]
    for plans in (paper_figures(field), sweep_figures(pd.DataFrame())):
        for name, plan in plans.items():
            assert len(plan.caption) > 80, name
            assert plan.caption.endswith("."), name
            assert "{" not in plan.caption


def test_docs_describe_every_figure_and_parameter_of_a_notebook() -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    section = text[text.index("## Figures and notebooks") :]
    described = set(re.findall(r"`(\w+)`", section))
    assert described >= {*READING, *SWEEP}
    for path in (ROOT / "analysis" / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        parameters = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
        named = re.findall(r"^(\w+) = ", "".join(parameters["source"]), re.M)
        assert described >= {path.stem, *named}


def test_nothing_is_cut_off_at_the_edges_of_a_column(written: Path) -> None:
    for path in sorted(written.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("L"))
        edges = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[0], pixels[-1]])
        assert edges.min() == 255, f"{path.name} reaches its edge"


def luminance(colour: str) -> float:
    """Relative luminance of a hex colour, as the web content accessibility guidelines define it."""
    channels = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_every_arm_is_readable_in_grey_print() -> None:
    looks = [*ARMS.values(), *SPARE]
    faint = [look.colour for look in looks if 1.05 / (luminance(look.colour) + 0.05) < 3]
    assert faint == [], "3:1 against white is what graphics need"
    lightness = [116 * luminance(colour) ** (1 / 3) - 16 for colour in PHASES.values()]
    assert np.abs(np.diff(lightness)).min() > 15, "neighbours in a bar differ without their hue"


def test_lines_of_arms_differ_without_their_colours(scores: Scores) -> None:
    with theme():
        figures = [paper.performance_profiles(scores), paper_figures(scores)["entropy_and_gradient_norm"]()]
    for figure in figures:
        assert figure is not None
        drawn = [line for line in figure.axes[0].get_lines() if line.get_label() in scores.study.arms]
        assert len(drawn) == len(scores.study.arms)
        assert len({(line.get_marker(), str(line.get_linestyle())) for line in drawn} - {("None", "-")}) == len(drawn)


def test_both_panels_of_entropy_and_gradient_norm_have_numbers(scores: Scores) -> None:
    with theme():
        figure = paper_figures(scores)["entropy_and_gradient_norm"]()
        assert figure is not None
        figure.draw_without_rendering()
    for axis in figure.axes:
        assert any(label.get_visible() and label.get_text() for label in axis.get_yticklabels())


TOKENS = [("entropy", histograms.token_entropy), ("ratio", histograms.token_ratio)]


@pytest.mark.parametrize(("channel", "draw"), TOKENS)
def test_numbers_of_tokens_are_those_of_the_first_and_of_the_last_update(
    tmp_path: Path, channel: str, draw: Callable[[Scores], Figure | None]
) -> None:
    recipe = synthetic.Recipe(
        arms={"grpo": 0.0, "dynamo": 0.1}, seeds=(0, 1), items=8, steps=6, traced=("Compute 6*7.",)
    )
    scores = Scores(load_study(synthetic.make_study(tmp_path, recipe)))
    found = histograms.traced_tokens(scores.study, channel)
    expected: dict[str, list[float]] = {"first": [], "last": []}
    for cell in (tmp_path / "cells").glob("dynamo-*"):
        for line in (cell / "traces.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["phase"] == "training":
                moment = "last" if row["step"] == 5 else "first"
                expected[moment] += [value for rollout in row["rollouts"] for value in rollout[channel]]
    assert expected["first"]
    assert expected["last"]
    for moment, values in expected.items():
        assert sorted(found[moment]["dynamo"]) == sorted(values)
    with theme():
        figure = draw(scores)
        assert histograms._tokens(scores, "none", "what was not recorded") is None
    assert figure is not None
    assert [axis.get_title("left") for axis in figure.axes[:2]] == ["first update", "last update"]


def test_a_study_reduced_to_two_arms_has_their_numbers(scores: Scores) -> None:
    pair = Scores(only(scores.study, ["dapo", "dynamo"], "dapo"))
    assert pair.study.arms == ["dapo", "dynamo"]
    assert (pair.final("dynamo", "pass_at_1") == scores.final("dynamo", "pass_at_1")).all()
    with pytest.raises(InputError, match="rloo"):
        only(scores.study, ["rloo"], "rloo")


def test_forty_arms_are_all_named_inside_every_figure(tmp_path: Path) -> None:
    arms = {"grpo": 0.0, "dynamo": 0.02} | {f"an_arm_of_number_{number}": 0.0 for number in range(38)}
    recipe = synthetic.Recipe(arms=arms, seeds=(0, 1), items=4, steps=4)
    scores = Scores(load_study(synthetic.make_study(tmp_path, recipe)))
    with theme():
        for name, draw in paper_figures(scores).items():
            figure = draw()
            if figure is None or name == "rollouts_per_prompt":  # shows allocating arms only
                continue
            figure.set_dpi(rcParams["savefig.dpi"])
            FigureCanvasAgg(figure).draw()
            named = {
                text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if text.get_text() in arms
            }
            assert set(named) >= arms.keys() - {"grpo"}, name
            for arm, box in named.items():
                assert figure.bbox.x0 <= box.x0, (name, arm)
                assert box.x1 <= figure.bbox.x1, (name, arm)
                assert figure.bbox.y0 <= box.y0, (name, arm)
                assert box.y1 <= figure.bbox.y1, (name, arm)
            figure.clear()


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    arms = {"grpo": 0.0, "dynamo": 0.02} | {f"arm_of_number_{number}": 0.0 for number in range(38)}
    recipe = synthetic.Recipe(
        arms=arms, seeds=(0, 1), items=4, steps=6, dynamic=[*arms][1:14], traced=("Compute 6*7.",), final_samples=8
    )
    return Scores(load_study(synthetic.make_study(tmp_path_factory.mktemp("field"), recipe)))


@pytest.mark.parametrize("column", COLUMNS)
def test_figures_of_forty_arms_fit_a_page_in_parts_that_hold_all(field: Scores, column: str) -> None:
    in_parts = set()
    for name, draw in paper_figures(field).items():
        named: set[str] = set()
        part, parts = 0, 1
        while part < parts:
            with theme(COLUMNS[column], PAPER_HEIGHT, part) as sheet:
                figure = draw()
            if figure is None:
                break
            assert figure.get_figheight() <= PAPER_HEIGHT + 1e-9, name
            here = {text.get_text() for text in figure.findobj(Text) if text.get_text() in field.study.arms}
            assert here, (name, part)
            named |= here
            part, parts = part + 1, sheet.parts
            figure.clear()
        in_parts |= {name} if parts > 1 else set()
        if part and name != "rollouts_per_prompt":
            assert named >= {*field.study.arms} - {"grpo"}, name
    if column == "single":
        assert in_parts >= {"learning_curves", "pass_at_k", "token_entropy", "token_ratio"}


def test_parts_are_files_of_their_own_and_old_ones_go(field: Scores, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("analysis.plotting.FORMATS", ("png",))
    stale = [tmp_path / name for name in ("x_learning_curves_single.png", "x_learning_curves_single_9.png")]
    for path in stale:
        path.write_bytes(b"")
    plans = {"learning_curves": paper_figures(field)["learning_curves"]}
    shown = write_paper_figures(plans, tmp_path, "x")
    assert [path.name for path in shown] == ["x_learning_curves_double.png"]
    numbered = [f"x_learning_curves_single_{part}" for part in (1, 2, 3)]
    assert "Part 2 of 3." in (tmp_path / f"{numbered[1]}.caption.txt").read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} == {"x_learning_curves_double", *numbered}


@pytest.mark.parametrize(("arms", "parts"), [(14, 1), (38, 3)])
def test_three_panels_of_histograms_are_in_as_many_parts_as_a_column_needs(arms: int, parts: int) -> None:
    rng = np.random.default_rng(0)
    sample = {f"arm_{arm}": rng.random(40) for arm in range(arms)}
    titles = []
    for part in range(parts):
        with theme(COLUMNS["single"], PAPER_HEIGHT, part) as sheet:
            figure = histograms._histograms([(title, sample, False) for title in "abc"], "steps")
        assert sheet.parts == parts
        assert figure.get_figheight() <= PAPER_HEIGHT + 1e-9
        titles += [axis.get_title("left") for axis in figure.axes if axis.get_title("left")]
    assert titles == ["a", "b", "c"]


def test_one_allocator_far_out_does_not_flatten_the_others(field: Scores, monkeypatch: Any) -> None:
    """Rollouts of an arm from 0 to 200, of the others from 2 to 12; three quarters of a run without history."""

    def shares(_: Any, arm: str) -> Any:
        values = np.arange(0.0, 201.0) if arm == "dynamo" else np.arange(2.0, 13.0)
        share = np.full((len(values), 8), 1 / len(values))
        share[:, :6] = (values == 8)[:, None]
        return np.linspace(0, 1e5, 9), values, share

    monkeypatch.setattr("analysis.figures_curves.rollout_shares", shares)
    with theme():
        figure = paper_figures(field)["rollouts_per_prompt"]()
    assert figure is not None
    axis = {panel.get_title("left"): panel for panel in figure.axes}["arm_of_number_3"]
    low, high = axis.transAxes.inverted().transform(axis.transData.transform([(0, 1.5), (0, 12.5)]))[:, 1]
    assert high - low > 0.25, "a thin line on one scale of 0 to 200 in equal steps"
    assert axis.get_ylim()[1] >= 200
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["0", "1"]
    mesh = axis.collections[0]
    assert mesh.get_clim()[1] == pytest.approx(1 / 11)
    assert figure.axes[-1].get_ylabel() == "share of prompts, %"


def test_what_is_exactly_the_centre_is_in_the_middle_of_its_cell() -> None:
    rng = np.random.default_rng(0)
    for spread in (0.01, 0.1, 0.37):
        rows = [np.concatenate([np.ones(300), rng.normal(1.1, spread, 500)]), rng.normal(0.9, spread, 500)]
        edges = histograms.edges_of(rows, False, centre=1.0)
        right = int(np.searchsorted(edges, 1.0))
        assert (edges[right - 1] + edges[right]) / 2 == pytest.approx(1.0)
        assert edges[0] <= np.quantile(np.concatenate(rows), 0.02)
        assert edges[-1] >= np.quantile(np.concatenate(rows), 0.98)


def test_tokens_of_ratio_one_stand_on_it_at_every_update(tmp_path: Path, monkeypatch: Any) -> None:
    rng = np.random.default_rng(1)
    ratios = {
        moment: {arm: np.concatenate([np.ones(500), rng.normal(mean, 0.1, 200)]) for arm in ("grpo", "dynamo")}
        for moment, mean in (("first", 1.0), ("last", 1.3))
    }
    recipe = synthetic.Recipe(arms={"grpo": 0.0, "dynamo": 0.1}, seeds=(0,), items=4, steps=4)
    scores = Scores(load_study(synthetic.make_study(tmp_path, recipe)))
    monkeypatch.setattr(histograms, "traced_tokens", lambda *_: ratios)
    with theme():
        figure = histograms.token_ratio(scores)
    assert figure is not None
    for axis in figure.axes[:2]:
        mesh: Any = axis.collections[0]
        edges, shares = mesh.get_coordinates()[0, :, 0], np.asarray(mesh.get_array())
        fullest = int(shares[0].argmax())
        assert shares[0, fullest] > 0.6
        assert (edges[fullest] + edges[fullest + 1]) / 2 == pytest.approx(1.0)
        assert all(line.get_xdata()[0] == 1.0 for line in axis.get_lines())


def test_an_arms_median_lies_inside_the_axis_with_half_of_its_values() -> None:
    rng = np.random.default_rng(0)
    usual, far = [rng.normal(0.15, 0.02, 400) for _ in range(40)], rng.normal(0.6, 0.1, 400)
    edges = histograms.edges_of([*usual, far], False)
    assert edges[-1] >= np.quantile(far, 0.75) > np.median(far)
    with theme(COLUMNS["single"]):
        sample = {str(place): row for place, row in enumerate([*usual, far])}
        figure = histograms._histograms([("entropy", sample, False)], "steps")
    shown = float(figure.axes[0].get_lines()[-1].get_xdata()[0])  # type: ignore[index]
    assert shown == pytest.approx(float(np.median(far)))
    assert shown < 0.95 * figure.axes[0].get_xlim()[1]
    assert figure.axes[0].collections[0].colorbar.extend == "max"  # type: ignore[union-attr]


@pytest.mark.parametrize("column", COLUMNS)
def test_numbers_on_logarithmic_axes_stay_apart(column: str) -> None:
    rng = np.random.default_rng(0)
    for middle, factor in ((6e-4, 0.6), (2.0, 0.5), (1e-3, 2.5)):
        sample = {f"entropy_advantage_{arm}": middle * np.exp(factor * rng.standard_normal(400)) for arm in range(14)}
        with theme(COLUMNS[column]):
            figure = histograms._histograms([(title, sample, True) for title in "abc"], "steps")
            figure.set_dpi(200)
            FigureCanvasAgg(figure).draw()
        for axis in figure.axes[:3]:
            low, high = axis.get_xlim()
            labels = [
                label.get_window_extent()
                for label, place in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
                if low <= place <= high and label.get_text()
            ]
            assert len(labels) > 1
            assert all(left.x1 < right.x0 for left, right in pairwise(labels))


def test_small_differences_by_difficulty_stay_pale_beside_a_bar_of_their_colours(scores: Scores) -> None:
    with theme():
        figure = paper.difficulty(scores)
    assert figure is not None
    low, high = figure.axes[0].images[0].get_clim()
    assert -low == high >= paper.LEAST_REACH
    assert figure.axes[1].get_ylabel() == "points"
    same = Scores(only(scores.study, ["grpo", "dapo"], "grpo"))
    with theme():
        figure = paper.difficulty(same)
    assert figure is not None
    assert figure.axes[0].images[0].get_clim() == (-paper.LEAST_REACH, paper.LEAST_REACH)


def test_markers_of_the_front_differ_without_colours_and_have_names(tmp_path: Path) -> None:
    recipe = synthetic.Recipe(seeds=(0, 1, 2), items=8, points=3, steps=4)
    scores = Scores(load_study(synthetic.make_study(tmp_path, recipe)))
    with theme():
        figure = paper.pareto(scores)
    assert figure is not None
    axis = figure.axes[0]
    drawn = [line for line in axis.get_lines() if line.get_label() in scores.study.arms]
    assert len(drawn) == len(scores.study.arms) == 14
    assert len({(line.get_marker(), line.get_fillstyle()) for line in drawn}) == 14
    highest = max(drawn, key=lambda line: float(np.max(line.get_ydata())))
    named = [text.get_text() for text in axis.texts]
    assert highest.get_label() in named
    assert len(named) == len(set(named))
    heights = [text.get_position()[1] for text in axis.texts]
    assert len(set(heights)) == len(heights)


def test_every_pair_of_marker_and_filling_is_one_arms() -> None:
    looks = [*ARMS.values(), *SPARE]
    assert len({(look.marker, FILLS[look.dash]) for look in looks}) == len(looks)


def test_many_arms_have_a_panel_each_for_entropy_norm_and_profile(field: Scores) -> None:
    with theme():
        figure = paper_figures(field)["entropy_and_gradient_norm"]()
        profiles = paper.performance_profiles(field)
    assert figure is not None
    assert profiles is not None
    titles = [axis.get_title("left") for axis in figure.axes if axis.get_visible()]
    assert sorted(titles) == sorted([*field.study.arms, *field.study.arms])
    panels = {axis.get_title("left"): axis for axis in profiles.axes if axis.get_visible()}
    assert set(panels) == {*field.study.arms} - {"grpo"}
    assert all(len(axis.get_lines()) <= 4 for axis in (*figure.axes, *panels.values()))
    thresholds = np.linspace(1 / field.study.samples, 1, field.study.samples)
    expected = paper.profile(field, "dynamo", thresholds) - paper.profile(field, "grpo", thresholds)
    shown = [line.get_ydata() for line in panels["dynamo"].get_lines() if len(line.get_xdata()) == len(thresholds)]
    np.testing.assert_allclose(shown[0], expected, atol=1e-12)
    parts = []
    for part in (0, 1):
        with theme(COLUMNS["double"], PAPER_HEIGHT, part) as sheet:
            half = paper_figures(field)["entropy_and_gradient_norm"]()
        assert half is not None
        assert sheet.parts == 2
        parts.append(half.get_supylabel())
    assert parts == ["entropy, nats", "gradient norm"]
