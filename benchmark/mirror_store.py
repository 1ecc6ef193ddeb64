"""An MLflow store, reduced to what the mirror needs; MLflow is imported when one is opened, not before."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.config import digest
from benchmark.mirror_points import Point
from benchmark.mirror_view import view_tags

# Before mlflow is imported, and only where the user has not decided otherwise. A dead server is found out
# within seconds, because the mirror has its own way of retrying.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_METRICS_A_BATCH = 1000
_PARAMS_A_BATCH = 100
_TAGS_A_BATCH = 100
_MAX_TAG = 5000


class Store:
    """One experiment of a tracking store. Every method raises whatever MLflow raises."""

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        database = _reach(tracking_uri)
        from mlflow import MlflowClient

        with _alone(database):
            self._client = MlflowClient(tracking_uri=tracking_uri)
            place = None if database is None else database.parent / "mlartifacts" / _file_name(experiment)
            self._experiment = self._find_or_create(experiment, None if place is None else place.as_uri())
        self._last: dict[str, dict[str, int]] = {}
        self._begun: dict[str, int] = {}

    def _find_or_create(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:
                found = self._client.get_experiment_by_name(name)  # somebody else may have been faster
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def show(self, currency: str, groups: Sequence[str], by: str) -> None:
        """Give the experiment the view that compares the `groups` of runs, named by tag `by`, at equal cost."""
        for key, value in view_tags(self._experiment, currency, groups, by).items():
            self._client.set_experiment_tag(self._experiment, key, value)

    def create(self, name: str, tags: Mapping[str, str], start: int | None) -> str:
        """A new run with status RUNNING, begun at `start` (milliseconds, now by default); its id."""
        tags = {key: value[:_MAX_TAG] for key, value in tags.items()}
        if commit := _commit():
            tags["mlflow.source.git.commit"] = commit
        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=name)
        self._last[run.info.run_id], self._begun[run.info.run_id] = {}, run.info.start_time
        return str(run.info.run_id)

    def runs(self, key: str, mine: Mapping[str, str]) -> dict[str, str]:
        """Ids of the living runs tagged with a folder's key, by cell name; the parent's cell name is ''.

        A request that was given up and still arrived may have made a second run of a name: the one that `mine` holds
        stays, or else the first, and the others go.
        """
        twice: list[str] = []
        found: dict[str, str] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment],
                f"tags.`rolloutbench.key` = '{key}'",
                max_results=1000,
                order_by=["attributes.start_time", "attributes.run_id"],
                page_token=token,
            )
            for run in page:
                name, run_id = run.data.tags["rolloutbench.cell"], run.info.run_id
                if name in found and run_id != mine.get(name):
                    twice.append(run_id)
                    continue
                if name in found:
                    twice.append(found[name])
                found[name] = run_id
            token = page.token
            if not token:
                break
        for run_id in twice:
            self.delete(run_id)
        return found

    def describe(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log parameters; the same again changes nothing."""
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in params.items()]
        for begin in range(0, len(items), _PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=items[begin : begin + _PARAMS_A_BATCH])

    def datasets(self, run_id: str, task: Mapping[str, Any]) -> None:
        """Log the problems trained and evaluated on as inputs; the digest is that of the task's configuration."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        sizes = {
            "training": {"items": task["train_items"]},
            "evaluation": {"items_per_family": task["eval_items_per_family"]},
        }
        files = {"training": task["train_file"], "evaluation": task["eval_files"]}
        inputs = []
        for context, size in sizes.items():
            kind, source = "code", {"tags": {"mlflow.source.name": "benchmark.problems", "task": task["name"]}}
            if task["train_file"] is not None:
                kind, source, size = "local", {"uri": files[context]}, {}
            name, identity = f"{task['name']}-{context}", digest({**task, "context": context})[:32]
            dataset = Dataset(name, identity, kind, json.dumps(source), profile=json.dumps(size))
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self._client.log_inputs(run_id, inputs)

    def checkpoint(self, run_id: str, folder: Path, name: str, step: int) -> None:
        """Register the policy in `folder` as the run's model, by its place and hash: no weights are uploaded."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

        weights = sorted(folder.glob("*.safetensors"))
        if not weights:  # cleaned up, or a run of another machine
            return
        models = self._models(run_id)
        if not models:
            place = {"path": str(folder.resolve()), "host": socket.gethostname()}
            for path in weights:
                with path.open("rb") as file:
                    place[f"sha256.{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
            model = self._client.create_logged_model(
                self._experiment, name, run_id, {MLFLOW_MODEL_IS_EXTERNAL: "true", **place}, model_type="policy"
            )
            models = [model.model_id]
        for model_id in models:
            self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        outputs = self._client.get_run(run_id).outputs
        if outputs is None or not outputs.model_outputs:
            self._client.log_outputs(run_id, [LoggedModelOutput(models[0], step)])

    def _models(self, run_id: str) -> list[str]:
        found = self._client.search_logged_models([self._experiment], f"source_run_id = '{run_id}'")
        return [model.model_id for model in found]

    def artifact(self, run_id: str, path: Path) -> None:
        """Upload a file, or a folder under its name; what is not there is left out."""
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), path.name)
        elif path.exists():
            self._client.log_artifact(run_id, str(path))

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of every metric of a run; asked from the store once, then kept up to date."""
        if run_id not in self._last:
            run = self._client.get_run(run_id)
            self._begun[run_id] = run.info.start_time
            keys = run.data.metrics
            history = {key: self._client.get_metric_history(run_id, key) for key in keys}
            self._last[run_id] = {key: max(metric.step for metric in history[key]) for key in keys}
        return self._last[run_id]

    def send(self, run_id: str, points: Sequence[Point]) -> None:
        """Log points in batches the store accepts.

        All carry the time at which the run began. A store keeps one of equal points, so a batch whose answer was
        lost, or that arrives long after it was given up, adds nothing when it was sent again.
        """
        from mlflow.entities import Metric

        last = self.last_steps(run_id)
        time = self._begun[run_id]
        for begin in range(0, len(points), _METRICS_A_BATCH):
            batch = points[begin : begin + _METRICS_A_BATCH]
            self._client.log_batch(run_id, [Metric(p.key, p.value, time, p.step) for p in batch])
            for point in batch:
                last[point.key] = max(point.step, last.get(point.key, -1))

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, cut to what a store keeps."""
        from mlflow.entities import RunTag

        items = [RunTag(key, value[:_MAX_TAG]) for key, value in tags.items()]
        for begin in range(0, len(items), _TAGS_A_BATCH):
            self._client.log_batch(run_id, tags=items[begin : begin + _TAGS_A_BATCH])

    def set_status(self, run_id: str, name: str, end: int | None) -> None:
        """RUNNING, or a final status with its end (milliseconds, now by default)."""
        if name == "RUNNING":
            self._client.update_run(run_id, status=name)
        else:
            self._client.set_terminated(run_id, name, end)

    def delete(self, run_id: str) -> None:
        """Move a run to the store's bin, and forget its models."""
        for model_id in self._models(run_id):
            self._client.delete_logged_model(model_id)
        self._client.delete_run(run_id)


def redact(text: str) -> str:
    """`text` without the user names and passwords that URIs in it carry."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _reach(uri: str) -> Path | None:
    """Connect to a database store once, since MLflow would retry for most of an hour before it gives up.

    Returns:
        The file of a sqlite database.
    """
    if uri.startswith(("http://", "https://", "file:", "databricks")) or "://" not in uri:
        return None
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        engine.connect().close()
    finally:
        engine.dispose()
    if engine.url.get_backend_name() != "sqlite" or not engine.url.database:
        return None
    return Path(engine.url.database).resolve()


@contextlib.contextmanager
def _alone(database: Path | None) -> Iterator[None]:
    """Let one process at a time make the tables of a sqlite database: MLflow's crash when several do."""
    if database is None:
        yield
        return
    folder = os.open(database.parent, os.O_RDONLY)  # a lock on the folder leaves no file behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


@functools.cache
def _commit() -> str:
    """The commit of the checkout this module belongs to; '' for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
