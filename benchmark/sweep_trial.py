"""One trial of a sweep: a setting of one arm, run with every tuning seed, told to Optuna."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import TrialState

from benchmark.cells import Cell, Fence, Job, RunCell, read_json
from benchmark.config import digest
from benchmark.errors import InputError, Interrupted
from benchmark.jsonl import Row, atomic_write_json, read_rows
from benchmark.sweep_space import Point, Sweep
from benchmark.sweep_storage import open_storage, pruner, sampler, study_name, take, wait_for

DONE, PRUNED, DIVERGED = "done", "pruned", "diverged"


@dataclass(frozen=True)
class Trial(Job):
    """Trial `number` of arm `label` of the sweep in folder `root`; one process at a time holds its lease.

    ``trial.json`` names the setting and its cells as soon as it is drawn; ``result.json`` says how it ended.
    """

    sweep: Sweep
    identity: str
    label: str
    number: int
    root: Path
    storage: str | None = None

    @property
    def name(self) -> str:
        """The arm and the number: what its runs call themselves."""
        return f"{self.label}-t{self.number:03d}"

    @property
    def folder(self) -> Path:  # type: ignore[override]
        """The trial's own folder; its cells are among all others."""
        return self.root / "trials" / self.name

    @cached_property
    def run_hash(self) -> str:
        """Identity of the trial: the sweep's, the arm and the number."""
        return digest({"sweep": self.identity, "arm": self.label, "number": self.number})

    def cells(self, point: Point) -> list[Cell]:
        """The runs of a setting, a seed each. The first trial runs the default setting as it is."""
        setting = None if self.number == 0 else point
        seeds = self.sweep.config.seeds
        return [Cell.of(self.root, self.sweep.run(self.label, self.name, setting, seed)) for seed in seeds]

    def execute(self, run: RunCell, should_stop: Callable[[], bool], fence: Fence) -> None:
        """Draw the setting, or take the one drawn before; run what is missing of its cells; tell Optuna.

        Raises:
            InputError: the storage knows this trial to be over, but its cells are not here.
        """
        config, storage = self.sweep.config, open_storage(self.root, self.storage)
        study = optuna.load_study(
            storage=storage,
            study_name=study_name(config.sweep, self.label, self.identity),
            pruner=pruner(config),
        )
        known = study.get_trials(deepcopy=False)[self.number]
        study.sampler = sampler(config, self.label, self.number, len(known.params))
        if known.state.is_finished():
            self._finish(known.params, str(known.user_attrs["state"]), known.user_attrs["scores"])
            return
        trial = take(study, storage, self.number)
        point = {key: _suggest(trial, key, space.distribution) for key, space in config.spaces(self.label).items()}
        self._describe(point)
        state, scores = self._run_cells(trial, point, run, should_stop)
        trial.set_user_attr("scores", scores)
        trial.set_user_attr("state", state)
        if state == DIVERGED:
            study.tell(self.number, state=TrialState.FAIL)
        elif state == PRUNED and config.pruner == "median":
            study.tell(self.number, state=TrialState.PRUNED)
        else:
            study.tell(self.number, [fmean(score[goal] for score in scores) for goal in config.objective])
        self._finish(point, state, scores)

    def _run_cells(
        self, trial: optuna.Trial, point: Point, run: RunCell, should_stop: Callable[[], bool]
    ) -> tuple[str, list[dict[str, float]]]:
        config, scores = self.sweep.config, list[dict[str, float]]()
        for place, cell in enumerate(self.cells(point)):
            watch = config.pruner == "median" and place == 0
            halt = _Halt(trial, cell, config.objective[0], should_stop) if watch else should_stop
            try:
                with wait_for(cell.folder) as lease:
                    cell.execute(run, halt, lease.fence)
            except FloatingPointError as error:
                # The same setting would end the same way again: that is an outcome, not a fault to retry.
                atomic_write_json(cell.folder / "diverged.json", {"error": str(error)})
                return DIVERGED, scores
            except Interrupted:
                if not (isinstance(halt, _Halt) and halt.pruned):
                    raise
                shutil.rmtree(cell.folder / "checkpoint", ignore_errors=True)
                return PRUNED, scores
            scores.append(score(cell, config.objective, config.variance_replicates))
            if config.pruner == "wilcoxon":
                trial.report(scores[-1][config.objective[0]], place)
                if place + 1 < len(config.seeds) and trial.should_prune():
                    return PRUNED, scores
        return DONE, scores

    def _describe(self, point: Point) -> None:
        cells = [
            {"arm": self.name, "seed": cell.config.seed, "run_hash": cell.run_hash, "dir": f"cells/{cell.folder.name}"}
            for cell in self.cells(point)
        ]
        record = {"arm": self.label, "number": self.number, "point": dict(point), "cells": cells}
        if read_json(self.folder / "trial.json") != record:
            atomic_write_json(self.folder / "trial.json", record)

    def _finish(self, point: Point, state: str, scores: list[dict[str, float]]) -> None:
        for cell in self.cells(point)[: len(scores)]:
            if cell.result() is None:
                what = "the storage knows the trial to be over, but its runs are not here"
                remedy = "Give the --out that the sweep was run with, or another --storage"
                raise InputError(what, file=cell.folder, remedy=remedy)
        self._describe(point)
        atomic_write_json(
            self.folder / "result.json",
            {
                "run_hash": self.run_hash,
                "arm": self.label,
                "number": self.number,
                "state": state,
                "point": dict(point),
                "scores": scores,
            },
        )


@dataclass
class _Halt:
    """Asks the pruner whenever the run in `cell` has been evaluated at another share of its budget.

    Attributes:
        pruned: whether it said to stop. The default setting and the policy before training are not asked about.
    """

    trial: optuna.Trial
    cell: Cell
    goal: str
    should_stop: Callable[[], bool]
    seen: int = 0
    pruned: bool = False

    def __call__(self) -> bool:
        if self.should_stop():
            return True
        rows = read_rows(self.cell.folder / "evaluation.jsonl")[0]
        for point in range(self.seen + 1, 1 + max((row["point"] for row in rows), default=0)):
            self.trial.report(pass_rate([row for row in rows if row["point"] == point], self.goal), point)
            self.seen, self.pruned = point, self.pruned or (self.trial.number > 0 and self.trial.should_prune())
        return self.pruned


def _suggest(trial: optuna.Trial, key: str, distribution: optuna.distributions.BaseDistribution) -> Any:
    if isinstance(distribution, optuna.distributions.FloatDistribution):
        return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(key, distribution.low, distribution.high, log=distribution.log)
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    raise TypeError(f"no such distribution: {distribution}")


def score(cell: Cell, goals: tuple[str, ...], replicates: int) -> dict[str, float]:
    """The objectives of a finished run: pass@k of its final evaluation, mean over families; gradient variance."""
    final = [row for row in read_rows(cell.folder / "evaluation.jsonl")[0] if row["final"]]
    found = {}
    for goal in goals:
        if goal == "gradient_variance":
            from analysis.sweep_variance import relative_variance

            found[goal] = relative_variance(cell.config, cell.folder, replicates)
        else:
            found[goal] = pass_rate(final, goal)
    return found


def pass_rate(rows: Sequence[Row], goal: str) -> float:
    """pass@k of one evaluation, a row an item, mean over families."""
    from analysis.results import k_of
    from analysis.statistics import family_weights, pass_at_k

    values = pass_at_k([row["n"] for row in rows], [row["c"] for row in rows], k_of(goal))
    return float(values @ family_weights([row["family"] for row in rows]))
