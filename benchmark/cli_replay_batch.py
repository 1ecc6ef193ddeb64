"""`rolloutbench replay-batch`: run the batch again at which a run's numbers broke."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer


def replay_batch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The numerical_error folder of a run.")],
) -> None:
    """Run the batch again at which a run stopped for a NaN, an infinity or a number out of range.

    Exit code 1 if the same happens again, 0 if it does not happen here. Nothing in the run's folder is changed.

    \b
    Examples:
      rolloutbench replay-batch results/main_table/cells/grpo-s0-0123abcd/numerical_error
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from benchmark.bundle import replay

    found = replay(folder)
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    if found["again"] is not None:
        raise typer.Exit(1)
