"""`rolloutbench doctor`: what this machine can run, and the line that mends what is missing."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine can run, what is missing and the line that mends it.

    Exit code 1 where something is missing that everything needs. Nothing is installed, downloaded or changed.

    \b
    Examples:
      rolloutbench doctor
      rolloutbench doctor --json
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmark.doctor import examine_machine

    findings = list(examine_machine())
    missing = [finding for finding in findings if finding.state == "missing"]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            typer.echo(f"{finding.state:<8}{finding.name:<{width}}  {finding.found}")
            if finding.remedy:
                typer.echo(f"{'':8}{'':<{width}}  -> {finding.remedy}")
        typer.echo(f"{len(missing)} missing" if missing else "everything that is needed is here")
    if missing:
        raise typer.Exit(1)
