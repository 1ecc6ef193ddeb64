"""A study's frames from its MLflow mirror instead of its folder: the same records, so the same tables.

The mirror keeps the record files of finished runs as artifacts. They are brought into a folder in the suite's format
and read like any other results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.formatting import counted
from analysis.results import Study, load_study
from benchmark.errors import InputError
from benchmark.mirror import RECORDS, TRACES
from benchmark.mirror_store import redact
from benchmark.seal import listed_files

VARIANCE = "gradient_variance.json"
CELL = "rolloutbench.cell"
KEY = "rolloutbench.key"


def load_from_mlflow(tracking_uri: str, experiment: str, folder: Path) -> Study:
    """The study whose mirror is the latest of an experiment.

    Args:
        tracking_uri: any MLflow tracking URI. experiment: its name, that of the study.
        folder: where the records go; made if missing.

    Raises:
        InputError: no such store or experiment, nothing mirrored there, or a mirror without the records.
    """
    return load_study(bring(tracking_uri, experiment, folder))


def bring(tracking_uri: str, experiment: str, folder: Path) -> Path:
    """Write the plan, the gradient variance and the cells' records of an experiment's latest mirror below `folder`.

    What an older mirror lacks of them is named in a line of stderr.

    Returns:
        `folder`.

    Raises:
        InputError: as `load_from_mlflow`.
    """
    client, runs = _runs(tracking_uri, experiment)
    parents = [run for run in runs if run.data.tags.get(CELL) == ""]
    if not parents:
        raise InputError(
            "no study was mirrored there",
            key="experiment",
            value=experiment,
            remedy="Run `rolloutbench mirror DIR --tracking-uri URI`",
        )
    parent = parents[0]
    folder.mkdir(parents=True, exist_ok=True)
    _download(client, parent.info.run_id, "plan.json", folder)
    if any(file.path == VARIANCE for file in client.list_artifacts(parent.info.run_id)):
        _download(client, parent.info.run_id, VARIANCE, folder)
    children = [run for run in runs if run.data.tags.get(KEY) == parent.data.tags[KEY] and run.data.tags.get(CELL)]
    untraced = 0
    for run in children:
        if run.info.status != "FINISHED":
            continue
        cell = folder / "cells" / run.data.tags[CELL]
        cell.mkdir(parents=True, exist_ok=True)
        held = {file.path for file in client.list_artifacts(run.info.run_id)}
        absent = [name for name in RECORDS if name not in held]
        if absent:
            raise InputError(
                f"the run {run.info.run_name} has no {absent[0]}",
                key="experiment",
                value=experiment,
                remedy="Run `rolloutbench mirror --rebuild DIR` with the study's folder",
            )
        for name in ("config.yaml", *RECORDS, *([TRACES] if TRACES in held else [])):
            _download(client, run.info.run_id, name, cell)
        untraced += TRACES not in held and TRACES in (listed_files(cell / "result.json") or {})
    if untraced:
        what = f"not in MLflow: {TRACES} of {counted(untraced, 'run')}, and so no figures of tokens"
        print(f"{what}; `rolloutbench mirror --rebuild DIR` adds them, --source files has them", file=sys.stderr)
    return folder


def bring_tables(tracking_uri: str, experiment: str, folder: Path) -> Path:
    """Write the ``tables`` of the latest run of an experiment that has some below `folder`; returns it.

    Raises:
        InputError: no such store or experiment, or no run there has tables.
    """
    client, runs = _runs(tracking_uri, experiment)
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if any(file.path == "tables" for file in client.list_artifacts(run.info.run_id)):
            _download(client, run.info.run_id, "tables", folder)
            return folder
    raise InputError("no run there has tables", key="experiment", value=experiment, remedy="Run the study first")


def _runs(tracking_uri: str, experiment: str) -> tuple[Any, list[Any]]:
    """A client and the living runs of an experiment, the latest first."""
    import mlflow.exceptions
    from mlflow import MlflowClient

    database = tracking_uri.removeprefix("sqlite:///")
    if database != tracking_uri and not Path(database).is_file():  # MLflow would make an empty one
        raise InputError("no such file", file=database, remedy="Name the store that the study was mirrored to")
    try:
        client = MlflowClient(tracking_uri=tracking_uri)
        found = client.get_experiment_by_name(experiment)
    except mlflow.exceptions.MlflowException as error:
        what = f"does not answer ({redact(str(error)).splitlines()[0]})"
        remedy = "Start the server, or name another store"
        raise InputError(what, key="tracking_uri", value=redact(tracking_uri), remedy=remedy) from error
    if found is None:
        names = ", ".join(sorted(each.name for each in client.search_experiments()))
        raise InputError("no such experiment", key="experiment", value=experiment, remedy=f"There are: {names}")
    return client, list(_pages(client, found.experiment_id))


def _pages(client: Any, experiment_id: str) -> Iterator[Any]:
    token = None
    while True:
        order = ["attributes.start_time DESC"]
        page = client.search_runs([experiment_id], max_results=1000, page_token=token, order_by=order)
        yield from page
        token = page.token
        if not token:
            return


def _download(client: Any, run_id: str, name: str, folder: Path) -> None:
    client.download_artifacts(run_id, name, str(folder))
