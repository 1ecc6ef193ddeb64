"""`rolloutbench figures`: the notebooks, executed on the results there are."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from benchmark.completion import complete_notebook
from benchmark.errors import InputError


def figures(
    results: Annotated[Path, typer.Argument(metavar="DIR", help="A study's folder, or the folder of all.")] = Path(
        "results"
    ),
    notebook: Annotated[
        str | None,
        typer.Option(help="One notebook; by default all that DIR has results for.", autocompletion=complete_notebook),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("results/figures"),
    source: Annotated[str, typer.Option(help="files, or mlflow: then DIR names the experiment.")] = "files",
    tracking_uri: Annotated[
        str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store, for --source mlflow.")
    ] = "sqlite:///mlflow.db",
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the notebook.")
    ] = None,
) -> None:
    """Execute the notebooks of analysis/notebooks and write paper figures (SVG, PDF, PNG).

    \b
    Examples:
      rolloutbench figures
      rolloutbench figures results/main_table
      rolloutbench figures results/main_table --notebook your_method --set arm=dapo
      rolloutbench figures main_table --notebook main_results --source mlflow
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from analysis.notebook_choice import RESULTS, SOURCES, check_options, folder_of
    from analysis.notebook_runner import execute, execute_all
    from benchmark.registry import suggest

    if source not in SOURCES:
        raise InputError("no such source", key="--source", value=source, remedy=suggest(source, list(SOURCES)))
    if notebook is not None and notebook not in RESULTS:
        remedy = suggest(notebook, list(RESULTS))
        raise InputError("no such notebook", key="--notebook", value=notebook, remedy=remedy)
    asked = _pairs(options or [])
    check_options([notebook] if notebook else RESULTS, asked)
    given = {"source": source, "tracking_uri": tracking_uri, **asked}
    if notebook is not None:
        typer.echo(f"done: {execute(notebook, folder_of(notebook, results, source), out, given)}")
        return
    done = 0
    for executed in execute_all(results, out, given):
        typer.echo(
            f"skipped: {executed.name}: {executed.reason}" if executed.copy is None else f"done: {executed.copy}"
        )
        done += executed.copy is not None
    if not done:
        raise InputError("no notebook had results", file=results, remedy="Run a study first, or name its folder")


def _pairs(options: list[str]) -> dict[str, str]:
    pairs = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator:
            raise InputError("not KEY=VALUE", key="--set", value=option, remedy="Write --set arm=dapo")
        pairs[key] = value
    return pairs
