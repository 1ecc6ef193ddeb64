"""The `rolloutbench` command. Exit codes: 0 done, 1 failed or not in agreement, 2 bad input, 130 interrupted."""

# ruff: noqa: D301 (typer takes a backspace in a docstring as "keep these lines")

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmark.cli_audit import audit
from benchmark.cli_author import check, new_method
from benchmark.cli_compare import compare
from benchmark.cli_dashboard import dashboard
from benchmark.cli_doctor import doctor
from benchmark.cli_experiment import experiment
from benchmark.cli_figures import figures
from benchmark.cli_group import FAILED, INTERRUPTED, Group
from benchmark.cli_replay import replay
from benchmark.cli_replay_batch import replay_batch
from benchmark.cli_sweep import sweep, typed
from benchmark.cli_variance import variance
from benchmark.completion import complete_config, complete_method
from benchmark.errors import InputError
from benchmark.opening import check_folder, check_out, check_plan

if TYPE_CHECKING:
    from benchmark.study import Outcome

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""RolloutBench: which RLVR method is really better at equal compute, by how much, and why.

    \b
    Examples:
      rolloutbench study main_table --scale smoke
      rolloutbench compare dynamo grpo
      rolloutbench run --help
    """,
)

complete_study, complete_scale, complete_task = map(complete_config, ("studies", "scales", "tasks"))
Scale = Annotated[str, typer.Option(help="File of configs/scales, or a path.", autocompletion=complete_scale)]
Task = Annotated[
    str | None,
    typer.Option(help="File of configs/tasks, or a path; the scale's by default.", autocompletion=complete_task),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value; repeatable.")]
Budget = Annotated[
    str | None,
    typer.Option(metavar="CURRENCY=AMOUNT", help="tokens_generated=800000 or rollouts=4096; the scale's by default."),
]
StudyFile = Annotated[
    str,
    typer.Argument(metavar="STUDY", help="A file, or a name in configs/studies.", autocompletion=complete_study),
]
Tracking = Annotated[str, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow store that mirrors the results.")]
STORE = "sqlite:///mlflow.db"


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command there resumes it.")],
    method: Annotated[
        str | None,
        typer.Argument(metavar="METHOD", help="An arm of `rolloutbench methods`.", autocompletion=complete_method),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of a run, for instance a sweep's best.yaml.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(help="File of configs/scales, or a path; small by default.", autocompletion=complete_scale),
    ] = None,
    task: Task = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed s of every arm shares its random streams.")] = 0,
    budget: Budget = None,
    options: Set = None,
) -> None:
    """Run one arm with one seed, or resume it.

    \b
    Examples:
      rolloutbench run grpo --scale smoke --out runs/first
      rolloutbench run dynamo --seed 3 --set method.allocation.n_low=2 --out runs/dynamo-3
      rolloutbench run dapo --budget rollouts=4096 --set optimiser.learning_rate=1e-4 --out runs/dapo
      rolloutbench run --config results/sweeps/modulation/best.yaml --seed 7 --out runs/tuned
    """
    from benchmark.compose import compose_run
    from benchmark.study import run_single

    _one_thread()
    check_out(out)
    asked = [*_budget(budget), *(options or [])]
    planned = compose_run(method, scale=scale, task=task, seed=seed, options=asked, file=config)
    _finish(run_single(planned, out), out)
    if os.environ.get("RANK", "0") == "0":  # the first of the processes that a launcher started
        typer.echo(f"done: {out}")


@app.command()
def study(
    file: StudyFile,
    scale: Annotated[
        str | None, typer.Option(help="A scale other than the study's.", autocompletion=complete_scale)
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; the study's by default.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per core by default.")] = None,
    budget: Budget = None,
    options: Set = None,
    out: Annotated[Path | None, typer.Option(help="Results folder; results/<study> by default.")] = None,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another study's results; its runs are copied where equal.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and what it costs.")] = False,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Workers on a Ray cluster: auto, an address, or local.")
    ] = None,
    gpus: Annotated[float, typer.Option("--gpus-per-worker", min=0, help="Of a worker on a Ray cluster.")] = 0.0,
    tracking_uri: Tracking = STORE,
    mlflow: Annotated[bool, typer.Option(help="Mirror the results to MLflow.")] = True,
) -> None:
    """Run what is missing of a study and write its report.

    Start the same command on several machines that share the results folder and they divide the cells.

    \b
    Examples:
      rolloutbench study main_table
      rolloutbench study configs/studies/main_table.yaml --scale smoke --dry-run
      rolloutbench study main_table --seeds 16 --workers 8 --out results/sixteen_seeds
      rolloutbench study ablation --reuse results/main_table
      rolloutbench study main_table --scale paper-1.5b --ray auto --gpus-per-worker 1
    """
    from benchmark.compose import compose_study
    from benchmark.reuse import check_studies
    from benchmark.study import run_study
    from benchmark.workers import Pool

    _one_thread()
    plan = compose_study(file, scale=scale, seeds=seeds, options=[*_budget(budget), *(options or [])])
    folder = out or Path("results") / plan.study.study
    check_out(folder)
    check_studies(reuse or ())
    if dry_run:
        from benchmark.cli_plan import show_plan

        show_plan(plan, folder, workers)
        return
    pool: Any = Pool
    if ray is not None:
        from benchmark.ray_workers import RayPool, connect

        held = connect(ray, gpus)
        workers, pool = workers or held, partial(RayPool, gpus=gpus)
    uri, command, studies = tracking_uri if mlflow else None, typed(), reuse or ()
    given: dict[str, Any] = {"tracking_uri": uri, "pool": pool, "reuse": studies, "command": command}
    _finish(run_study(plan, folder, workers=workers, **given), folder)
    typer.echo(f"done: {folder / 'REPORT.md'}")


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list instead of a table.")] = False,
) -> None:
    """List the arms, external ones included.

    \b
    Examples:
      rolloutbench methods
      rolloutbench methods --json
    """
    from benchmark.registry import describe, names

    rows = [asdict(describe(name)) for name in names()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("name", "family", "kind", "changes", "reference"):
        table.add_column(heading, no_wrap=heading in ("name", "reference"))
    for row in rows:
        table.add_row(row["name"], row["family"], row["kind"], ", ".join(row["changes"]), row["reference"])
    # Whole words for a file or a pipe, which have no width.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


app.command()(replay)
app.command()(replay_batch)
app.command()(variance)
app.command()(experiment)
app.command()(figures)
app.command()(check)
app.command()(new_method)
app.command()(doctor)
app.command()(compare)
app.command()(dashboard)
app.command()(sweep)
app.command()(audit)


@app.command()
def warmup(scale: Scale = "small", task: Task = None, options: Set = None) -> None:
    """Make the starting policy of a scale and print its folder.

    Nothing is made that is there already; its configuration names it.

    \b
    Examples:
      rolloutbench warmup
      rolloutbench warmup --scale large-cpu --set policy.warmup.seed=1
    """
    from benchmark.compose import compose_run

    _one_thread()
    config = compose_run("grpo", scale=scale, task=task, options=options or [])
    from benchmark.study import warm_up

    typer.echo(warm_up(config))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study's results.")],
    readme: Annotated[Path | None, typer.Option(help="Write the marked parts of this README too.")] = None,
) -> None:
    """Rebuild REPORT.md, index.html, tables and figures of a study, a sweep, measured variances or an experiment.

    \b
    Examples:
      rolloutbench report results/main_table
      rolloutbench report results/main_table --readme README.md
    """
    from analysis.rebuild import WITHOUT_PLAN, rebuild

    if not any((folder / settings).exists() for settings in WITHOUT_PLAN):
        _plan_in(folder)
    check_folder(folder)
    typer.echo(f"done: {rebuild(folder, readme)}")


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study's results.")],
    watch: Annotated[float | None, typer.Option(min=0.1, metavar="SECONDS", help="Show it again and again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a study that runs: cells, spend against budget, time left, accuracy so far.

    \b
    Examples:
      rolloutbench status results/main_table
      rolloutbench status results/main_table --watch 5
    """
    from rich import print as show

    from benchmark import status as view

    plan = _plan_in(folder)
    if as_json:
        typer.echo(json.dumps(view.as_json(view.read_status(folder, plan)), indent=2))
    elif watch is not None:
        view.watch(folder, plan, watch)
    else:
        show(view.render(view.read_status(folder, plan)))


@app.command()
def mirror(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study's results.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make every MLflow run anew.")] = False,
    tracking_uri: Tracking = STORE,
) -> None:
    """Bring MLflow up to date with a study.

    The files of a study are its record; MLflow mirrors them.

    \b
    Examples:
      rolloutbench mirror results/main_table
      rolloutbench mirror --rebuild results/main_table --tracking-uri http://127.0.0.1:5000
    """
    experiment = _plan_in(folder)["study"]
    from benchmark.mirror import Mirror

    follower = Mirror(tracking_uri, folder, experiment)
    if not (follower.rebuild() if rebuild else follower.close()):
        typer.echo("error: MLflow did not take everything, or another mirror is at work; see above", err=True)
        raise typer.Exit(FAILED)
    typer.echo(f"done: {folder}")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="rolloutbench")


def _one_thread() -> None:
    # Read by OpenMP when torch is imported; two threads on two busy cores are slower than one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _budget(text: str | None) -> list[str]:
    if text is None:
        return []
    currency, separator, amount = text.partition("=")
    if not separator:
        raise InputError("not CURRENCY=AMOUNT", key="--budget", value=text, remedy="Write --budget rollouts=4096")
    from benchmark.config import BUDGET_CURRENCIES
    from benchmark.layers import did_you_mean

    if currency not in BUDGET_CURRENCIES:
        remedy = did_you_mean(currency, BUDGET_CURRENCIES)
        raise InputError("no budget has this currency", key="--budget", value=text, remedy=remedy)
    return [f"budget.currency={currency}", f"budget.amount={amount}"]


def _plan_in(folder: Path) -> dict[str, Any]:
    from benchmark.cells import read_json

    plan = read_json(folder / "plan.json")
    if plan is None:
        raise InputError("no plan.json there", file=folder, remedy="Give the results folder of a study")
    check_folder(folder)
    return check_plan(folder, plan)


def _finish(outcome: Outcome, folder: Path) -> None:
    """Exit with what the outcome means, naming failures and how to go on."""
    for cell, why in outcome.failed.items():
        typer.echo(f"failed: {cell}: {why} (see {folder / 'cells' / cell / 'run.log'})", err=True)
    if outcome.interrupted:
        typer.echo(f"interrupted: {outcome.done}/{outcome.total} done; goes on with: {typed()}", err=True)
        raise typer.Exit(INTERRUPTED)
    if outcome.failed:
        typer.echo(f"what failed is run again by: {typed()}", err=True)
        raise typer.Exit(FAILED)


if __name__ == "__main__":  # `accelerate launch -m benchmark.cli run ...`
    main()
