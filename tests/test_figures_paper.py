"""Figures beyond the report's: what they show against truth that is known, and their files at paper sizes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from analysis import figures_paper as paper
from analysis.comparisons import Scores
from analysis.figures import paper_figures, write_paper_figures
from analysis.palette import ARMS, PHASES, SPARE
from analysis.plotting import COLUMNS, theme
from analysis.results import load_study, only
from analysis.statistics import family_weights
from analysis.table_difficulty import UPPER_ENDS, difficulty_bins, difficulty_table
from benchmark.errors import InputError

sys.path.append(str(Path(__file__).parent))
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


@pytest.mark.parametrize(("channel", "draw"), [("entropy", paper.token_entropy), ("ratio", paper.token_ratio)])
def test_numbers_of_tokens_are_those_of_the_first_and_of_the_last_update(
    tmp_path: Path, channel: str, draw: Callable[[Scores], Figure | None]
) -> None:
    recipe = synthetic.Recipe(
        arms={"grpo": 0.0, "dynamo": 0.1}, seeds=(0, 1), items=8, steps=6, traced=("Compute 6*7.",)
    )
    scores = Scores(load_study(synthetic.make_study(tmp_path, recipe)))
    found = paper.traced_tokens(scores.study, channel)
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
        assert paper._tokens(scores, "none", "what was not recorded") is None
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
