"""`rolloutbench variance`: the gradient-variance study from the command line."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmark.completion import complete_config

STORE = "sqlite:///mlflow.db"


def variance(
    scale: Annotated[
        str, typer.Option(help="File of configs/scales, or a path.", autocompletion=complete_config("scales"))
    ] = "small",
    task: Annotated[
        str | None,
        typer.Option(
            help="File of configs/tasks, or a path; the scale's by default.", autocompletion=complete_config("tasks")
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the runs and of the pools.")] = 0,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Arm to train; repeatable; grpo and dynamo.")] = None,
    fractions: Annotated[
        list[float] | None, typer.Option("--fraction", help="Of the training budget; repeatable; 0, 1/3, 2/3, 1.")
    ] = None,
    rollouts: Annotated[int, typer.Option(min=32, help="Rollouts of a prompt's pool.")] = 256,
    blocks: Annotated[int, typer.Option(min=4, help="Parts of a pool that intervals leave out.")] = 16,
    budgets: Annotated[list[int] | None, typer.Option("--budget", help="Rollouts per prompt; repeatable.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value.")] = None,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results/variance"),
    tracking_uri: Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store.")] = STORE,
    mlflow: Annotated[bool, typer.Option(help="Log tables and figures to MLflow.")] = True,
) -> None:
    """Measure by how much rollout allocation lowers the variance of the gradient.

    Arms are trained once; on frozen checkpoints every allocator is replayed on the same rollouts.

    \b
    Examples:
      rolloutbench variance
      rolloutbench variance --scale smoke --rollouts 128 --budget 4 --budget 8 --out results/variance_smoke
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from analysis.variance_study import VarianceConfig, run_variance_study
    from benchmark.layers import Layer, validate
    from benchmark.workers import default_workers

    given: dict[str, Any] = {
        "scale": scale,
        "task": task,
        "seed": seed,
        "rollouts": rollouts,
        "blocks": blocks,
        "options": options or [],
    }
    given |= {key: value for key, value in (("arms", arms), ("fractions", fractions), ("budgets", budgets)) if value}
    config = validate(VarianceConfig, Layer(given))
    report = run_variance_study(config, out, workers=workers or default_workers())
    if mlflow:
        log_to_mlflow(out, config.model_dump(mode="json"), tracking_uri)
    typer.echo(f"done: {report}")


def log_to_mlflow(folder: Path, settings: Mapping[str, Any], tracking_uri: str) -> bool:
    """Log settings, ratios, report, tables and figures as one run of experiment ``variance``; never raises.

    Returns:
        Whether MLflow took everything; a reason goes to standard error otherwise.
    """
    try:
        from benchmark.mirror_store import Store

        store = Store(tracking_uri, "variance")
        run = store.create(folder.name, {"rolloutbench.study": "variance"}, None)
        store.describe(run, {key: str(value) for key, value in settings.items()})
        store.send(run, _points(folder))
        for name in ("REPORT.md", "tables", "figures"):
            store.artifact(run, folder / name)
        store.set_status(run, "FINISHED", None)
    except Exception as error:  # files are the record: no tracking fault may fail the study
        from benchmark.mirror_store import redact

        print(f"MLflow did not take everything ({type(error).__name__}: {redact(str(error))})", file=sys.stderr)
        return False
    return True


def _points(folder: Path) -> Sequence[Any]:
    import pandas as pd

    from benchmark.mirror_points import Point

    frame = pd.read_csv(folder / "tables" / "variance.csv")
    frame = frame[frame["coordinates"] == "gradient"]
    keys = "variance/ratio_" + frame["allocator"] + "_" + frame["advantage"].str.replace(" ", "_")
    rows = zip(keys + "_n" + frame["budget"].astype(str), frame["ratio"], frame["fraction"], frame["arm"], strict=True)
    return [Point(f"{key}_{arm}", float(value), round(100 * share)) for key, value, share, arm in rows]
