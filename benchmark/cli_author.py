"""`rolloutbench new-method` and `rolloutbench check`: from a formula to an arm that others can trust."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmark.completion import complete_method

if TYPE_CHECKING:
    from benchmark.conformance import Finding

UNDER_CHECK = "method_under_check"


def check(
    method: Annotated[
        str,
        typer.Argument(metavar="METHOD", help="An installed arm, or module:Class.", autocompletion=complete_method),
    ],
    train: Annotated[bool, typer.Option(help="Tiny runs too, about ten seconds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Hold a method to the contract of every arm; exit code 1 where it breaks it.

    \b
    Examples:
      rolloutbench check dynamo
      rolloutbench check my_package.my_module:MyMethod
      rolloutbench check my_method --no-train
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmark import registry

    if ":" not in method:
        findings = _examine(method, train)
    else:
        sys.path.insert(0, str(Path.cwd()))
        with registry.registered(UNDER_CHECK, method):
            findings = _examine(UNDER_CHECK, train)
    failed = [finding for finding in findings if not finding.holds]
    if as_json:
        typer.echo(json.dumps([asdict(finding) | {"holds": finding.holds} for finding in findings], indent=2))
    else:
        _show(findings)
        typer.echo(f"{method}: {len(findings) - len(failed)} of {len(findings)} checks hold")
    if failed:
        raise typer.Exit(1)


def new_method(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the arm: letters, digits, underscores.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Its folder; rolloutbench-NAME by default.")] = None,
) -> None:
    """Write a package with a method of your own: it installs, passes its tests and trains as it is.

    \b
    Examples:
      rolloutbench new-method my_method
      rolloutbench new-method my_method --out ../my-method
    """
    from benchmark.new_method import write_package

    # Not NAME: in the working directory, a folder of that name would hide the installed module.
    folder = out or Path(f"rolloutbench-{name.replace('_', '-')}")
    written = write_package(name, folder)
    for path in written:
        typer.echo(path)
    package, study = (shlex.quote(str(path)) for path in (folder, folder / "study.yaml"))
    typer.echo(
        f"\nNext:\n"
        f"  python -m pip install --no-deps -e {package}\n"
        f"  rolloutbench check {name}\n"
        f"  rolloutbench study {study}"
    )


def _examine(name: str, train: bool) -> list[Finding]:
    from benchmark.conformance import decision_checks, examine
    from benchmark.registry import build

    built = build(name, {})
    findings = list(examine(built, decision_checks()))
    if train:
        from benchmark.conformance_run import run_checks

        with tempfile.TemporaryDirectory(prefix="rolloutbench-check-") as folder:
            findings += examine(built, run_checks(name, Path(folder)))
    return findings


def _show(findings: list[Finding]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("check", "", "what is demanded; what was found"):
        table.add_column(heading, no_wrap=heading != "what is demanded; what was found")
    for finding in findings:
        word = Text("holds", "green") if finding.holds else Text("BROKEN", "bold red")
        found = finding.demand if finding.holds else f"{finding.demand}\n{finding.reason}"
        table.add_row(finding.check, word, Text(found))
    # Whole words for a file or a pipe, which have no width.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
