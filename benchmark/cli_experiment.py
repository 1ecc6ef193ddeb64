"""`rolloutbench experiment`: an experiment beside the arms from the command line."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmark.completion import complete_config


def experiment(
    file: Annotated[
        str,
        typer.Argument(
            metavar="EXPERIMENT",
            help="A file, or the name of one in configs/experiments.",
            autocompletion=complete_config("experiments"),
        ),
    ],
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value; repeatable.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; results/experiments/<name> by default.")] = None,
) -> None:
    """Try an idea from neighbouring work that is no arm, and write its report.

    \b
    Examples:
      rolloutbench experiment all_action
      rolloutbench experiment forgetting --set seeds=[0,1] --set tokens=40000 --out results/experiments/short
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from analysis.experiment import load, run_experiment
    from benchmark.workers import default_workers

    planned = load(file, options or [])
    folder = out or Path("results") / "experiments" / planned.experiment
    typer.echo(f"done: {run_experiment(planned, folder, workers=workers or default_workers())}")
