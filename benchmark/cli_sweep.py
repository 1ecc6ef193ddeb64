"""`rolloutbench sweep`: tune every arm of a table alike, from the command line."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmark.completion import complete_config

if TYPE_CHECKING:
    from benchmark.sweep import SweepOutcome
    from benchmark.sweep_space import Sweep

FAILED, INTERRUPTED = 1, 130
STORE = "sqlite:///mlflow.db"
COUNTED = ("rollouts", "tokens_generated", "flops")


def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep file, or the name of one in configs/sweeps.",
            autocompletion=complete_config("sweeps"),
        ),
    ],
    trials: Annotated[int | None, typer.Option(min=2, help="Trials of every arm; the file's by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; results/sweeps/<sweep> by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Database of Optuna's trials; a journal in DIR by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs.")] = False,
    tracking_uri: Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store.")] = STORE,
    mlflow: Annotated[bool, typer.Option(help="Mirror the results to MLflow.")] = True,
) -> None:
    """Run what is missing of a sweep and write its report.

    Every arm gets the same number of trials; its best settings and its default run again on fresh seeds, and only that
    is reported. Start the same command on several machines that share the folder and they divide the trials.

    \b
    Examples:
      rolloutbench sweep modulation --dry-run
      rolloutbench sweep configs/sweeps/modulation.yaml --trials 64 --workers 8
      rolloutbench sweep modulation --storage postgresql+psycopg://user@host/sweeps
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmark.compose import find
    from benchmark.sweep import run_sweep
    from benchmark.sweep_config import sweep_folder
    from benchmark.sweep_space import read_sweep
    from benchmark.workers import WorkersFailedError

    asked = read_sweep(find("sweeps", file), trials=trials)
    folder = out or sweep_folder(asked.config)
    if dry_run:
        _show_plan(asked, folder, workers)
        return
    try:
        uri = tracking_uri if mlflow else None
        outcome = run_sweep(asked, folder, workers=workers, url=storage, tracking_uri=uri, command=typed())
    except WorkersFailedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    _finish(outcome, folder)


def typed() -> str:
    """The command as it was typed, without the user names and passwords of its URLs: it goes on where it stopped."""
    from benchmark.mirror_store import redact

    return shlex.join(["rolloutbench", *map(redact, sys.argv[1:])])


def _finish(outcome: SweepOutcome, folder: Path) -> None:
    """Exit with what the outcome means, naming failures, their logs and the command that goes on."""
    again = typed()
    for name, why in outcome.trials.failed.items():
        typer.echo(f"failed: {name}: {why} (see {folder / 'trials' / name / 'run.log'})", err=True)
    for name, why in (outcome.final.failed if outcome.final else {}).items():
        typer.echo(f"failed: {name}: {why} (see {folder / 'final' / 'cells' / name / 'run.log'})", err=True)
    if outcome.trials.interrupted or (outcome.final is not None and outcome.final.interrupted):
        over = f"{outcome.trials.done}/{outcome.trials.total} trials"
        typer.echo(f"interrupted: {over} done; goes on with: {again}", err=True)
        raise typer.Exit(INTERRUPTED)
    if outcome.trials.failed or outcome.final is None or outcome.final.failed:
        typer.echo(f"what failed is run again by: {again}", err=True)
        raise typer.Exit(FAILED)
    typer.echo(f"done: {folder / 'REPORT.md'}")


def _show_plan(asked: Sweep, folder: Path, workers: int | None) -> None:
    from analysis.formatting import counted
    from benchmark.cells import Cell
    from benchmark.estimate import estimate
    from benchmark.progress import duration, short
    from benchmark.run import measure_unit_prices
    from benchmark.sweep import FINAL, all_trials
    from benchmark.workers import default_workers

    config, count = asked.config, workers or default_workers()
    trials = all_trials(asked, folder)
    over = sum(trial.result() is not None for trial in trials)
    # No setting is known before its trial runs: all are priced as their arm's default.
    tuning = [Cell.of(folder, asked.run(t.label, f"{t.label}-t000", None, s)) for t in trials for s in config.seeds]
    places = 1 + config.finalists.count
    finals = [
        Cell.of(folder / FINAL, asked.run(arm.label, arm.label, None, seed, final=True))
        for arm in config.arms
        for seed in config.finalists.seeds * places
    ]
    typer.echo(
        f"{config.sweep}: {counted(len(config.arms), 'arm')} x {counted(config.trials, 'trial')} x "
        f"{counted(len(config.seeds), 'seed')}, {counted(over, 'trial')} done; then the default and "
        f"{counted(config.finalists.count, 'finalist')} of every arm on "
        f"{counted(len(config.finalists.seeds), 'fresh seed')}; in {folder}"
    )
    for label, cells in (("trials", tuning), ("finals", finals)):
        probe = None if any(cell.result() for cell in cells) else measure_unit_prices
        cost = estimate(cells, probe)
        hours = duration(cost.total["wall_seconds"] / count)
        known = ", ".join(f"{name} {short(cost.total[name])}" for name in COUNTED if name in cost.total)
        told = f"{label}: {counted(len(cells), 'run')}; {known}; about {hours} with {counted(count, 'worker')}"
        typer.echo(f"{told}; {cost.source}")
