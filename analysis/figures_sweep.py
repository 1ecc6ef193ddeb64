"""Figures and tables of a sweep's trials, from its Optuna journal or from its report's table of trials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.palette import styles
from analysis.plotting import legend_right, narrow, new_figure, panels, percent
from analysis.sweep_data import TRIALS
from benchmark.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

JOURNALS = ("journal.log", "*.journal", "*.log")


def load_trials(folder: Path) -> pd.DataFrame:
    """Finished trials of a sweep: arm, trial, value (first objective), params (one column ``param/<name>`` each).

    Args:
        folder: a sweep's results, or an Optuna journal. A journal is newer than ``tables/trials.csv``; where the trials
            are in a database, or come from MLflow, there is the table alone.

    Raises:
        InputError: there is neither, or no trial in it has finished.
    """
    table = folder / "tables" / TRIALS
    if table.is_file() and not _journals(folder):
        return pd.read_csv(table)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    file = journal_of(folder)
    storage = JournalStorage(JournalFileBackend(str(file)))
    rows = []
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id, deepcopy=False, states=(TrialState.COMPLETE,)):
            values = {"arm": arm_of(study.study_name), "trial": trial.number, "value": float(trial.values[0])}
            rows.append(values | {f"param/{name}": value for name, value in trial.params.items()})
    if not rows:
        raise InputError("no trial has finished", file=file, remedy="Run the sweep first")
    return pd.DataFrame(rows).sort_values(["arm", "trial"], kind="stable", ignore_index=True)


def has_trials(folder: Path) -> bool:
    """Whether `load_trials` finds trials in a folder, or in the journal that it is."""
    return folder.is_file() or (folder / "tables" / TRIALS).is_file() or bool(_journals(folder))


def journal_of(folder: Path) -> Path:
    """The Optuna journal in a folder, or the file itself.

    Raises:
        InputError: there is none.
    """
    if folder.is_file():
        return folder
    found = _journals(folder)
    if not found:
        raise InputError("no Optuna journal", file=folder, remedy="Name the results folder of a sweep")
    return found[0]


def _journals(folder: Path) -> list[Path]:
    found = []
    for path in (path for pattern in JOURNALS for path in sorted(folder.glob(pattern))):
        with path.open(encoding="utf-8") as file:
            if file.readline().startswith('{"op_code"'):
                found.append(path)
    return found


def arm_of(study_name: str) -> str:
    """The arm of a study called ``arm``, or ``sweep/arm hash``."""
    return re.sub(r" [0-9a-f]{8}$", "", study_name.rsplit("/", 1)[-1])


def best_settings(trials: pd.DataFrame) -> pd.DataFrame:
    """Each arm's trials, default (trial 0) and best value with the best trial's parameters.

    The best of many noisy values is too high: a fair comparison re-runs the best setting on fresh seeds.
    """
    rows = []
    for arm, own in trials.groupby("arm", sort=False):
        records = own.to_dict("records")
        best = max(records, key=lambda record: float(record["value"]))
        params = {str(k).removeprefix("param/"): v for k, v in best.items() if str(k).startswith("param/")}
        defaults = [float(record["value"]) for record in records if record["trial"] == 0]
        head = {"arm": arm, "trials": len(records), "default": defaults[0] if defaults else np.nan}
        rows.append({**head, "best": best["value"], **{k: v for k, v in params.items() if pd.notna(v)}})
    return pd.DataFrame(rows)


def best_so_far(trials: pd.DataFrame) -> Figure:
    """Best value after so many trials, a line an arm; points are the trials."""
    figure = new_figure(2.3 if narrow() else 3.0)
    axis: Axes = figure.subplots()
    looks = styles(list(dict.fromkeys(trials["arm"])))
    for arm, own in trials.groupby("arm", sort=False):
        style, values = looks[str(arm)], own["value"].to_numpy(float)
        at = np.arange(1, len(values) + 1)
        axis.plot(at, values, style.marker, color=style.colour, markersize=3, alpha=0.35, markeredgewidth=0)
        axis.step(
            at, np.maximum.accumulate(values), where="post", color=style.colour, linestyle=style.dash, label=str(arm)
        )
    axis.set_xlabel("trials")
    axis.set_ylabel("objective, best so far, %")
    percent(axis.yaxis)
    legend_right(figure, axis)
    return figure


def slices(trials: pd.DataFrame) -> Figure | None:
    """Value against each numeric parameter, a panel a parameter, the arms that have it; None without any."""
    names = [str(name) for name in trials if str(name).startswith("param/") and _numeric(trials[str(name)])]
    if not names:
        return None
    figure, axes = panels(len(names), 3, height=1.9, share_x=False)
    looks = styles(list(dict.fromkeys(trials["arm"])))
    for axis, name in zip(axes, names, strict=True):
        for arm, own in trials.dropna(subset=[name]).groupby("arm", sort=False):
            style = looks[str(arm)]
            axis.plot(own[name], own["value"], style.marker, color=style.colour, markersize=3.5, label=str(arm))
        axis.set_title(name.removeprefix("param/"), loc="left", fontsize=7)
        percent(axis.yaxis)
    figure.supylabel("objective, %", fontsize=8.5)
    return figure


def _numeric(column: pd.Series[float]) -> bool:
    return bool(pd.api.types.is_numeric_dtype(column.dropna().infer_objects()))
