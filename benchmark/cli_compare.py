"""`rolloutbench compare`: one sentence about two arms."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmark.completion import complete_arm, complete_metric
from benchmark.errors import InputError

STUDY = Path("results/main_table")


def compare(
    arm: Annotated[str, typer.Argument(metavar="A", help="An arm of the study.", autocompletion=complete_arm)],
    other: Annotated[str, typer.Argument(metavar="B", help="The arm to compare it with.", autocompletion=complete_arm)],
    results: Annotated[Path, typer.Option(metavar="DIR", help="A study's results.")] = STUDY,
    metric: Annotated[
        str | None,
        typer.Option(help="pass_at_<k>; the study's primary metric by default.", autocompletion=complete_metric),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Say which of two arms is better, by how much, at what confidence and what cost.

    \b
    Examples:
      rolloutbench compare dynamo grpo
      rolloutbench compare dynamo dapo --results results/ablation --metric pass_at_32 --json comparison.json
    """
    if not (results / "plan.json").exists():
        remedy = f"Run one (rolloutbench study {results.name}), or name one with --results"
        raise InputError("no study there", file=results, remedy=remedy)
    from analysis.compare import compare as compare_arms
    from benchmark.jsonl import atomic_write_json
    from benchmark.opening import printable

    found = compare_arms(results, arm, other, metric)
    if json is not None:
        atomic_write_json(json, found.record())
    typer.echo(printable(found.sentence()))
