"""What the notebooks of ``analysis/notebooks`` call: results from files or from MLflow, tables and figures to show."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import table_scores, table_spend
from analysis.captions import SWEEP
from analysis.comparisons import Scores
from analysis.figures import Plan, Plans, paper_figures, write_paper_figures
from analysis.from_mlflow import bring, bring_tables
from analysis.notebook_choice import SOURCES, locate
from analysis.results import load_study
from analysis.tables import Table
from benchmark.errors import InputError

if TYPE_CHECKING:
    from IPython.display import Markdown

INTERVALS = "Markers are ratios, lines are 95 % intervals; the line at 1 is uniform allocation."


def open_study(results: str, source: str, tracking_uri: str) -> Scores:
    """The scores of a study.

    Args:
        results: its folder; with ``source="mlflow"`` the last part of it is the experiment's name.
        source: ``files`` or ``mlflow``. tracking_uri: the store, for ``mlflow``.

    Raises:
        InputError: another source, or nothing to read there.
    """
    return Scores(load_study(_folder(results, source, tracking_uri, bring)))


def open_variance(results: str, source: str, tracking_uri: str) -> pd.DataFrame:
    """The ratios of a gradient-variance study, one row a checkpoint, advantage, budget and allocator.

    Raises:
        InputError: as `open_study`.
    """
    file = _folder(results, source, tracking_uri, bring_tables) / "tables" / "variance.csv"
    if not file.is_file():
        raise InputError("no such table", file=file, remedy="Run `rolloutbench variance` first")
    return pd.read_csv(file)


def open_sweep(results: str, source: str, tracking_uri: str) -> pd.DataFrame:
    """The whole trials of a sweep (`analysis.figures_sweep.load_trials`); `results` may be an Optuna journal.

    Raises:
        InputError: as `open_study`.
    """
    from analysis.figures_sweep import load_trials

    return load_trials(_folder(results, source, tracking_uri, bring_tables))


def _folder(results: str, source: str, tracking_uri: str, fetch: Callable[[str, str, Path], Path]) -> Path:
    if source not in SOURCES:
        raise InputError("is no source", key="source", value=source, remedy="Sources are files and mlflow")
    if source == "files":
        return locate(results)
    return fetch(tracking_uri, Path(results).name, Path(tempfile.mkdtemp(prefix="rolloutbench-")))


def tables(scores: Scores) -> dict[str, Table]:
    """The tables that a paper starts from, by name."""
    study = scores.study
    others = [(arm, study.reference) for arm in study.arms if arm != study.reference and study.reference in study.arms]
    made = [table_scores.main_table(scores)]
    if others:
        made += [table_scores.differences_table(scores, scores.differences(others, study.metric))]
    made += [table_scores.aggregates_table(scores), table_spend.spend_table(scores)]
    return {table.name: table for table in made}


def study_figures(scores: Scores) -> Plans:
    """All figures of a study, with the gradient variance that its folder may hold."""
    file = scores.study.folder / "gradient_variance.json"
    record: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return paper_figures(scores, record)


def variance_figures(frame: pd.DataFrame) -> Plans:
    """Figures of `open_variance` rows, at the middle budget where a figure shows one."""
    from analysis import figures_variance as draw

    gradient = frame[frame["coordinates"] == "gradient"]
    labels = list(dict.fromkeys(gradient["checkpoint"]))
    budgets = sorted(gradient["budget"].unique())
    budget = budgets[(len(budgets) - 1) // 2]
    at = f"at {budget} rollouts a prompt"
    ratio = "Variance of the gradient relative to uniform at equal draws, {}; below 1 is better. " + INTERVALS
    plans = {
        f"variance_ratio_n{budget}": Plan(
            lambda: draw.variance_ratio(gradient[gradient["budget"] == budget], labels[0]),
            ratio.format(f"{labels[0]}, {at}"),
        ),
        "variance_ratio": Plan(
            lambda: draw.variance_ratio(gradient, labels[0]),
            ratio.format(f"{labels[0]}, a row an advantage and a column a budget"),
        ),
        "variance_ratio_last": Plan(
            lambda: draw.variance_ratio(gradient, labels[-1]),
            ratio.format(f"{labels[-1]}, a row an advantage and a column a budget"),
        ),
        "predicted_and_realised": Plan(
            lambda: draw.predicted_and_realised(gradient, budget),
            f"Reduction of the variance that a rule's own model predicts and the one measured, {at}; a point a "
            "checkpoint. On the dashed line the prediction holds; below 0 the rule is worse than uniform.",
        ),
    }
    if gradient["fraction"].nunique() > 1:
        plans["along_training"] = Plan(
            lambda: draw.along_training(gradient, budget),
            f"Variance along training {at}: under uniform allocation (above), of allocators relative to it (below); "
            "bands are 95 % intervals.",
        )
    return plans


def sweep_figures(trials: pd.DataFrame) -> Plans:
    """Figures of `open_sweep` rows."""
    from analysis import figures_sweep as draw

    figures = {"best_so_far": lambda: draw.best_so_far(trials), "slices": lambda: draw.slices(trials)}
    return {name: Plan(figures[name], caption) for name, caption in SWEEP.items()}


def show_table(table: Table) -> Markdown:
    """A table under its title with its notes."""
    from IPython.display import Markdown

    text = "\n\n".join([f"**{table.title}**", table.markdown(), " ".join(table.notes)])
    return Markdown(text)  # type: ignore[no-untyped-call]


WIDE = ("variance_ratio", "variance_ratio_last", "predicted_and_realised", "along_training")
"""Figures of `variance_figures` that are grids of panels: too many for one column of a paper."""


def write_and_show(plans: Plans, out: str, prefix: str) -> None:
    """Write figures at both column widths into `out` (`WIDE` ones at the larger only) and show the larger."""
    from IPython.display import Image, display

    for path in write_paper_figures(plans, Path(out), prefix, WIDE):
        display(Image(filename=str(path)))  # type: ignore[no-untyped-call]
