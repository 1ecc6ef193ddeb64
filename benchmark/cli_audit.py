"""`rolloutbench audit`: verify a results folder, one's own or another's."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

DISAGREES = 1


def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Results of a study, a sweep or a single run.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Verify a results folder without changing it: nothing altered, accounts that add up, a report that follows.

    Exit code 0 if all that is recorded agrees, 1 if something does not, 2 if there are no results. What an older
    version did not record is named and is no disagreement.

    \b
    Examples:
      rolloutbench audit results/main_table
      rolloutbench audit results/main_table --json
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import json

    from analysis.audit import audit as verify
    from benchmark.opening import printable

    found = verify(folder)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        for label, lines in (("wrong", found.wrong), ("not checked", _brief(found.lacks)), ("checked", found.checked)):
            for line in lines:
                typer.echo(printable(f"{label}: {line}"))
        typer.echo(f"{len(found.wrong)} disagreements" if found.wrong else "agrees")
    if found.wrong:
        raise typer.Exit(DISAGREES)


def _brief(lacks: list[str]) -> list[str]:
    """What many runs lack alike, said once with their number."""
    counts = Counter(line.partition(": ")[2] or line for line in lacks)
    lone = {line.partition(": ")[2] or line: line for line in lacks}
    return [lone[what] if count == 1 else f"{what} ({count} runs)" for what, count in counts.items()]
