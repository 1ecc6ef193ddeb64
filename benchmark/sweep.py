"""A sweep from file to report: tune every arm alike, run the best on fresh seeds, report."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.cells import Job, RunCell, read_json, running
from benchmark.compose import Plan
from benchmark.config import ArmConfig, RunConfig, StudyConfig
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json, atomic_write_text
from benchmark.layers import dump
from benchmark.progress import Bar, Display
from benchmark.study import Interrupts, Outcome, mirrored, run_study, supervise, warm_up
from benchmark.sweep_space import Sweep, best_yaml
from benchmark.sweep_storage import fingerprint, prepare
from benchmark.sweep_trial import DONE, Trial
from benchmark.workers import Pool, default_workers

SWEEP, STATE, FINAL = "sweep.yaml", "sweep.json", "final"
DEATHS = 3
"""Worker processes that one trial may take down in an invocation before it counts as failed."""


@dataclass(frozen=True)
class SweepOutcome:
    """How an invocation ended: its trials, and the finalists if it got there.

    Attributes:
        trials: `done` counts trials that are over, however they ended.
        final: None where the sweep was interrupted before it had finalists.
    """

    trials: Outcome
    final: Outcome | None


def all_trials(sweep: Sweep, folder: Path, url: str | None = None) -> list[Trial]:
    """Every trial in the order in which to run them: number by number, so that an early stop leaves arms even."""
    config, identity = sweep.config, sweep.identity
    labels = [arm.label for arm in config.arms]
    return [Trial(sweep, identity, label, n, folder, url) for n in range(config.trials) for label in labels]


def ranked(sweep: Sweep, trials: Sequence[Trial], label: str) -> list[dict[str, Any]]:
    """Results of an arm's whole trials, the best mean of the first objective first, earlier trials on ties."""
    goal = sweep.config.objective[0]
    found = [result for trial in trials if trial.label == label and (result := trial.result()) is not None]
    whole = [result for result in found if result["state"] == DONE]
    return sorted(whole, key=lambda result: (-mean(result["scores"], goal), result["number"]))


def mean(scores: Sequence[dict[str, float]], goal: str) -> float:
    """Mean of one objective over seeds."""
    return sum(score[goal] for score in scores) / len(scores)


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    workers: int | None = None,
    url: str | None = None,
    tracking_uri: str | None = None,
    run: RunCell | None = None,
    prepare_policy: Callable[[RunConfig], object] | None = None,
    display: Display | None = None,
    command: str = "",
) -> SweepOutcome:
    """Run what is missing of a sweep in `folder` and write its report.

    Args:
        workers: processes; one per core by default.
        url: database of Optuna's trials; the journal in `folder` by default.
        tracking_uri: MLflow store that follows the files; None for no mirror.
        run, prepare_policy: replace training and warm-up (tests).
        command: what was typed: the report names it beside a failure, since it runs what failed again.

    Raises:
        InputError: the folder holds another sweep, or was begun with another storage.
        WorkersFailedError: worker processes cannot start.
    """
    display = display or Display()
    count = workers or default_workers()
    if url is not None and url.startswith("sqlite") and count > 1:
        remedy = "Leave --storage away (the journal takes many writers), or add --workers 1"
        raise InputError("sqlite is not for parallel writers", key="--storage", value=url, remedy=remedy)
    trials = all_trials(sweep, folder, url)
    _claim_folder(sweep, folder, trials[0].identity, fingerprint(url))
    missing = [trial for trial in trials if trial.result() is None]
    display.note(f"{sweep.config.sweep}: {len(trials)} trials, {len(missing)} to run, in {folder}")
    prepare(sweep, folder, url, trials[0].identity)
    (prepare_policy or warm_up)(trials[0].cells(sweep.default(trials[0].label))[0].config)
    plan = partial(write_plan, sweep, trials, folder, command)
    plan()
    with mirrored(tracking_uri, folder, sweep.config.sweep, display):
        outcome = _tune(trials, plan, count, run, display) if missing else _outcome(trials, "", False)
        plan()
        final = None
        if not outcome.interrupted:
            final = _finals(sweep, trials, folder, count, tracking_uri, run, prepare_policy, display, command)
        if final is not None and not final.interrupted:
            from analysis.sweep_report import write_sweep_report

            write_sweep_report(folder)
    return SweepOutcome(outcome, final)


def _claim_folder(sweep: Sweep, folder: Path, identity: str, storage: str) -> None:
    found = read_json(folder / STATE)
    if found is None:
        atomic_write_json(folder / STATE, {"identity": identity, "storage": storage})
    elif found["identity"] != identity:
        what = "the folder holds another sweep (its search, seeds, budget or defaults differ)"
        raise InputError(what, file=folder, remedy="Choose another --out, or delete it")
    elif found["storage"] != storage:
        what = "the sweep in the folder keeps its trials in another storage"
        raise InputError(what, file=folder, key="--storage", remedy="Give the one it was begun with")
    atomic_write_text(folder / SWEEP, dump(sweep.config))


def _tune(
    trials: Sequence[Trial], plan: Callable[[], None], count: int, run: RunCell | None, display: Display
) -> Outcome:
    """Run the missing trials; `plan` writes ``plan.json`` anew whenever a trial has got its setting or is over."""
    sweep, folder = trials[0].sweep, trials[0].root
    invocation, over = uuid.uuid4().hex, dict[str, int]()
    budget = sweep.run(trials[0].label, trials[0].label, None, sweep.config.seeds[0]).budget
    jobs: Sequence[Job] = trials
    pool = Pool(jobs, min(count, len(trials)), invocation, folder / "workers.log", run, deaths=DEATHS)
    known = 0

    def look() -> tuple[Bar, list[Bar]]:
        nonlocal known
        if (written := sum(1 for _ in folder.glob("trials/*/*.json"))) != known:
            known = written
            plan()
        return bars(trials, budget.currency, budget.amount * len(sweep.config.seeds), over)

    with Interrupts() as interrupts:
        supervise(pool, interrupts, display, look)
    return _outcome(trials, invocation, interrupts.count > 0)


def _outcome(trials: Sequence[Trial], invocation: str, interrupted: bool) -> Outcome:
    failed = {trial.name: why for trial in trials if (why := trial.failure(invocation)) is not None}
    return Outcome(sum(trial.result() is not None for trial in trials), len(trials), failed, interrupted)


def bars(trials: Sequence[Trial], currency: str, each: int, over: dict[str, int]) -> tuple[Bar, list[Bar]]:
    """Total and running bars.

    Args:
        each: budget of a trial, all seeds, in `currency`.
        over: trials found to be over by earlier calls, extended in place.
    """
    running_bars, spent = list[Bar](), 0
    for trial in trials:
        if trial.name not in over and trial.result() is not None:
            over[trial.name] = each
        if trial.name in over:
            continue
        record = read_json(trial.folder / "trial.json") or {"cells": []}
        states = [read_json(trial.root / cell["dir"] / "progress.json") or {"spent": 0} for cell in record["cells"]]
        here = sum(state["spent"] for state in states)
        spent += here
        if record["cells"] and running(trial.folder):
            at = sum(state.get("state") == "done" for state in states)
            message = f"seed {min(at + 1, len(states))} of {len(states)}"
            running_bars.append(Bar(trial.name, here, each, currency, message))
    total = Bar(f"{len(over)}/{len(trials)} trials", spent + sum(over.values()), each * len(trials), currency)
    return total, running_bars


def write_plan(sweep: Sweep, trials: Sequence[Trial], folder: Path, command: str = "") -> None:
    """``plan.json`` with a cell for every trial and seed, for `rolloutbench status` and the MLflow mirror."""
    first = sweep.run(trials[0].label, trials[0].label, None, sweep.config.seeds[0])
    plan = {
        "study": sweep.config.sweep,
        "question": sweep.config.question,
        "primary_metric": sweep.config.objective[0],
        "primary_currency": first.budget.currency,
        "scale": first.scale,
        "task": first.task.name,
        "families": list(first.task.families),
        "arms": [trial.name for trial in trials],
        "groups": [arm.label for arm in sweep.config.arms],
        "searched": list(dict.fromkeys(key for arm in sweep.config.arms for key in sweep.config.spaces(arm.label))),
        "seeds": list(sweep.config.seeds),
        "reference": f"{sweep.config.reference}-t000",
        "command": command,
        "cells": [cell for trial in trials for cell in _planned(trial)],
    }
    atomic_write_json(folder / "plan.json", plan)


def _planned(trial: Trial) -> list[dict[str, Any]]:
    """A trial's cells: nameless before it has a setting; ``ended`` says how it ended where that kept one from ending.

    ``group`` is the arm that the trial tunes.
    """
    record, result = read_json(trial.folder / "trial.json"), read_json(trial.folder / "result.json")
    seeds = trial.sweep.config.seeds
    cells = record["cells"] if record else [{"arm": trial.name, "seed": s, "dir": f"cells/{trial.name}"} for s in seeds]
    whole = len(cells) if result is None else len(result["scores"])
    ended = [{} if place < whole or result is None else {"ended": result["state"]} for place in range(len(cells))]
    return [{**cell, "group": trial.label, **how} for cell, how in zip(cells, ended, strict=True)]


def final_plan(sweep: Sweep, trials: Sequence[Trial]) -> Plan | None:
    """Every arm's default and its best settings on fresh seeds, an ordinary study; None before any arm has a best."""
    config, arms, settings = sweep.config, [], list[tuple[str, str, dict[str, Any] | None]]()
    for arm in config.arms:
        settings.append((arm.label, arm.label, None))
        best = ranked(sweep, trials, arm.label)[: config.finalists.count]
        settings += [(arm.label, f"{arm.label}-t{r['number']:03d}", r["point"]) for r in best if r["number"]]
    if len(settings) == len(config.arms) and not any(ranked(sweep, trials, arm.label) for arm in config.arms):
        return None
    for label, name, _ in settings:
        arms.append(ArmConfig(name=config.arm(label).name, label=name))
    seeds = config.finalists.seeds
    runs = [sweep.run(label, name, at, seed, final=True) for seed in seeds for label, name, at in settings]
    study = StudyConfig(
        study=f"{config.sweep}_final",
        question=config.question or f"What do the arms of {config.sweep} reach once each is tuned?",
        primary_metric=config.objective[0],
        primary_currency=runs[0].budget.currency,
        scale=config.scale,
        task=config.task,
        arms=tuple(arms),
        seeds=seeds,
        reference=config.reference,
    )
    return Plan(study, tuple(runs))


def _finals(
    sweep: Sweep,
    trials: Sequence[Trial],
    folder: Path,
    count: int,
    tracking_uri: str | None,
    run: RunCell | None,
    prepare_policy: Callable[[RunConfig], object] | None,
    display: Display,
    command: str,
) -> Outcome | None:
    plan = final_plan(sweep, trials)
    if plan is None:
        return None
    write_best(sweep, trials, folder)
    return run_study(
        plan,
        folder / FINAL,
        workers=count,
        tracking_uri=tracking_uri,
        run=run,
        prepare=prepare_policy,
        display=display,
        command=command,
    )


def write_best(sweep: Sweep, trials: Sequence[Trial], folder: Path) -> None:
    """``best/<arm>.yaml``, and the first arm's as ``best.yaml``."""
    config = sweep.config
    for place, arm in enumerate(config.arms):
        best = next(iter(ranked(sweep, trials, arm.label)), None)
        if best is None:
            continue
        goal, run = config.objective[0], sweep.run(arm.label, arm.label, None, config.seeds[0])
        note = (
            f"{arm.label} as sweep {config.sweep} tuned it: trial {best['number']} of {config.trials}, mean {goal} "
            f"{mean(best['scores'], goal):.4f} over tuning seeds {', '.join(map(str, config.seeds))}\n"
            f"at {run.budget.amount:,} {run.budget.currency} a run (by it this was chosen; fresh seeds: REPORT.md)\n"
            "rolloutbench run --config <this file> --seed 0 --out runs/tuned"
        )
        text = best_yaml(sweep, arm.label, best["point"] if best["number"] else None, note)
        atomic_write_text(folder / "best" / f"{arm.label}.yaml", text)
        if place == 0:
            atomic_write_text(folder / "best.yaml", text)
