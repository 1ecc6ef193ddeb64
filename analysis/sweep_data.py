"""Reading a sweep's folder: how every trial ended, what tuning cost, and what the finalists reached.

Everything comes from the files; Optuna's studies are made anew in memory, so no database is needed to report.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import TrialState, create_trial

from analysis.comparisons import Scores
from analysis.results import load_study, read_json
from analysis.statistics import Floats
from benchmark.errors import InputError
from benchmark.jsonl import read_rows
from benchmark.layers import read_yaml, validate
from benchmark.ledger import CURRENCIES
from benchmark.opening import check_folder, inside
from benchmark.sweep_config import SweepConfig
from benchmark.sweep_space import Sweep
from benchmark.sweep_trial import DIVERGED, DONE

FEWEST = 4
"""Whole trials below which nothing is said about parameters."""
TRIALS = "trials.csv"
"""The file among the report's tables that has every whole trial with its settings."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its folder tells.

    Attributes:
        trials: one row per trial: arm, number, state (done, pruned, diverged, failed, missing), message, point, scores
            (a list of seeds, each a mapping of objectives), cells.
        spend: one row per cell that cost anything: arm, number, seed and the training spend in every currency,
            device_seconds, evaluation_tokens.
        scores: of defaults and finalists on fresh seeds; None before one has run.
    """

    sweep: Sweep
    folder: Path
    trials: pd.DataFrame
    spend: pd.DataFrame
    scores: Scores | None

    @property
    def config(self) -> SweepConfig:
        """The sweep file."""
        return self.sweep.config

    @property
    def labels(self) -> list[str]:
        """The arms, in the file's order."""
        return [arm.label for arm in self.config.arms]

    def of(self, label: str, *states: str) -> pd.DataFrame:
        """Trials of an arm in one of `states` (in any by default), by number."""
        mine = self.trials[self.trials["arm"] == label]
        return mine[mine["state"].isin(states)] if states else mine

    def values(self, label: str, goal: str) -> Floats:
        """(T, S) objective of every whole trial of an arm and seed, by number."""
        rows = [[score[goal] for score in scores] for scores in self.of(label, DONE)["scores"]]
        return np.asarray(rows, dtype=np.float64).reshape(len(rows), len(self.config.seeds))

    def tuned(self, label: str) -> int | None:
        """Number of the arm's best whole trial by the mean of the first objective, the earlier on ties."""
        done = self.of(label, DONE)
        if done.empty:
            return None
        means = self.values(label, self.config.objective[0]).mean(axis=1)
        return int(done["number"].iloc[int(np.argmax(means))])

    def name(self, label: str, number: int) -> str:
        """What the finals call a setting."""
        return label if number == 0 else f"{label}-t{number:03d}"

    @cached_property
    def studies(self) -> dict[str, optuna.Study]:
        """Optuna's view of each arm's whole trials, in memory; a trial keeps its number."""
        return {label: self._study(label) for label in self.labels}

    def _study(self, label: str) -> optuna.Study:
        study = optuna.create_study(directions=self.config.directions)
        spaces = {key: space.distribution for key, space in self.config.spaces(label).items()}
        for row in self.of(label).to_dict("records"):
            if row["state"] != DONE:
                study.add_trial(create_trial(state=TrialState.FAIL))
                continue
            means = [float(np.mean([s[goal] for s in row["scores"]])) for goal in self.config.objective]
            study.add_trial(create_trial(params=row["point"], distributions=spaces, values=means))
        return study

    def importances(self, label: str) -> pd.DataFrame | None:
        """Shares by parameter, columns ``fANOVA`` and ``PED-ANOVA``; None with too few trials or no differences."""
        values = self.values(label, self.config.objective[0]).mean(axis=1)
        if len(values) < FEWEST or np.ptp(values) == 0:
            return None
        study, evaluators = self.studies[label], optuna.importance
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes", UserWarning)
            known = {
                "fANOVA": evaluators.FanovaImportanceEvaluator(seed=0),
                "PED-ANOVA": evaluators.PedAnovaImportanceEvaluator(),
            }
            # PED-ANOVA asks what sets the lowest targets apart, whatever the study's direction.
            found = {
                name: evaluators.get_param_importances(study, evaluator=one, target=lambda t: -t.values[0])
                for name, one in known.items()
            }
        return pd.DataFrame(found).reindex(list(self.config.spaces(label)))


def load_sweep(folder: Path) -> SweepRecord:
    """Read a sweep's folder.

    Raises:
        InputError: it holds no sweep, or a record is damaged.
    """
    if not (folder / "sweep.yaml").exists():
        raise InputError("no sweep.yaml there", file=folder, remedy="Give the results folder of a sweep")
    check_folder(folder)
    written = read_yaml(folder / "sweep.yaml")
    sweep = Sweep(validate(SweepConfig, written), written)
    config = sweep.config
    rows = [_trial(folder, arm.label, n) for arm in config.arms for n in range(config.trials)]
    spend = [
        found for row in rows for cell in row["cells"] if (found := _spend(inside(folder, cell["dir"]), row, cell))
    ]
    final, scores = folder / "final", None
    if any(final.glob("cells/*/result.json")):
        scores = Scores(load_study(final))
    return SweepRecord(sweep, folder, pd.DataFrame(rows), pd.DataFrame(spend), scores)


def _trial(folder: Path, label: str, number: int) -> dict[str, Any]:
    own = folder / "trials" / f"{label}-t{number:03d}"
    described, result = read_json(own / "trial.json") or {}, read_json(own / "result.json")
    row: dict[str, Any] = {"arm": label, "number": number, "message": "", "point": described.get("point"), "scores": []}
    row["cells"] = described.get("cells", [])
    if result is not None:
        return row | {key: result[key] for key in ("state", "point", "scores")}
    failed = read_json(own / "failure.json")
    if failed is not None:
        return row | {"state": "failed", "message": str(failed.get("error", ""))}
    return row | {"state": "missing"}


def _spend(cell: Path, row: dict[str, Any], planned: dict[str, Any]) -> dict[str, Any] | None:
    """What a cell cost; of one that never ended, what its ledger holds."""
    head = {"arm": row["arm"], "number": row["number"], "seed": planned["seed"]}
    result = read_json(cell / "result.json")
    if result is not None:
        spent = {name: result["spent"][name] for name in (*CURRENCIES, "device_seconds")}
        return head | spent | {"evaluation_tokens": result.get("evaluation_tokens", 0)}
    ledger = read_rows(cell / "ledger.jsonl")[0]
    if not ledger:
        return None
    trained = [entry for entry in ledger if entry["event"] not in ("evaluation", "oracle")]
    spent = {name: sum(entry[name] for entry in trained) for name in CURRENCIES}
    evaluated = sum(entry["tokens_generated"] for entry in ledger if entry["event"] == "evaluation")
    return head | spent | {"device_seconds": np.nan, "evaluation_tokens": evaluated}


def trial_rows(record: SweepRecord) -> pd.DataFrame:
    """Every whole trial: arm, trial, value (mean over seeds of the first objective), ``param/<name>`` a parameter."""
    goal = record.config.objective[0]
    rows = [
        {"arm": row["arm"], "trial": row["number"], "value": float(np.mean([score[goal] for score in row["scores"]]))}
        | {f"param/{name}": value for name, value in row["point"].items()}
        for label in record.labels
        for row in record.of(label, DONE).to_dict("records")
    ]
    return pd.DataFrame(rows, columns=None if rows else ["arm", "trial", "value"])


def states(record: SweepRecord, label: str) -> str:
    """How an arm's trials ended: 30 done, 2 diverged."""
    counts = record.of(label)["state"].value_counts()
    order = (DONE, "pruned", DIVERGED, "failed", "missing")
    return ", ".join(f"{counts[state]} {state}" for state in order if state in counts)
