"""`rolloutbench replay`: history rules and allocators on recorded success counts."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def replay(
    counts: Annotated[Path, typer.Argument(metavar="COUNTS.jsonl", help="Right rollouts of every prompt by visit.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the results there.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for REPORT.md, tables and figures.")] = None,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Arm that allocates by counts; repeatable.")] = None,
    rollouts: Annotated[
        int | None, typer.Option(min=2, help="Rollouts per prompt to give out; as many as recorded by default.")
    ] = None,
) -> None:
    """Replay history rules and allocators on the success counts of a recorded run.

    How well does each rule predict a prompt's next visit, which half-life and prior predict best, and what variance
    would each allocator have had? A line of the file is {"id": "prompt 7", "n_rollouts": 8, "correct": [0, 3, 5]}.

    \b
    Examples:
      rolloutbench replay counts.jsonl
      rolloutbench replay counts.jsonl --json replay.json --out results/replay
      rolloutbench replay counts.jsonl --arm grpo --arm my_arm --rollouts 16
    """
    from analysis.replay import replay_counts, summary, write_replay
    from benchmark.jsonl import atomic_write_json
    from benchmark.progress import Bar, Display

    with Display() as shown:
        found = replay_counts(
            counts, arms, rollouts, lambda share: shown.update(Bar("replay", 100 * share, 100.0, "%"), [])
        )
    if json_file is not None:
        atomic_write_json(json_file, found.as_json())
    if out is not None:
        typer.echo(f"done: {write_replay(found, out)}")
    typer.echo(summary(found))
