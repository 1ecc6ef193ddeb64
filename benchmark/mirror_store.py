"""An MLflow store, reduced to what the mirror needs; MLflow is imported when one is opened, not before."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.config import digest
from benchmark.mirror_record import Point

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
        location = _reach(tracking_uri)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=tracking_uri)
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            place = None if location is None else (location / _file_name(experiment)).as_uri()
            self._experiment = self._client.create_experiment(experiment, artifact_location=place)
        else:
            self._experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
        self._last: dict[str, dict[str, int]] = {}

    def create(self, name: str, tags: Mapping[str, str], start: int | None) -> str:
        """A new run with status RUNNING, begun at `start` (milliseconds, now by default); its id."""
        tags = {key: value[:_MAX_TAG] for key, value in tags.items()}
        if commit := _commit():
            tags["mlflow.source.git.commit"] = commit
        run = self._client.create_run(self._experiment, start_time=start, tags=tags, run_name=name)
        self._last[run.info.run_id] = {}
        return str(run.info.run_id)

    def runs(self, key: str) -> dict[str, str]:
        """Ids of the living runs tagged with a folder's key, by cell name; the parent's cell name is ''."""
        found: dict[str, str] = {}
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment], f"tags.`rolloutbench.key` = '{key}'", max_results=1000, page_token=token
            )
            found |= {run.data.tags["rolloutbench.cell"]: run.info.run_id for run in page}
            token = page.token
            if not token:
                return found

    def describe(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log parameters; the same again changes nothing."""
        from mlflow.entities import Param

        items = [Param(key, value) for key, value in params.items()]
        for begin in range(0, len(items), _PARAMS_A_BATCH):
            self._client.log_batch(run_id, params=items[begin : begin + _PARAMS_A_BATCH])

    def dataset(self, run_id: str, task: Mapping[str, Any]) -> None:
        """Log the task as the run's input: its digest is that of its configuration, its source is code."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = CodeDatasetSource({"mlflow.source.name": "benchmark", "task": task["name"]}).to_json()
        profile = {key: value for key, value in task.items() if isinstance(value, int)}
        dataset = Dataset(
            str(task["name"]),
            digest(task)[:32],
            source_type="code",
            source=source,
            profile=json.dumps(profile),
        )
        self._client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def artifact(self, run_id: str, path: Path) -> None:
        """Upload a file, or a folder under its name; what is not there is left out."""
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), path.name)
        elif path.exists():
            self._client.log_artifact(run_id, str(path))

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step of every metric of a run; asked from the store once, then kept up to date."""
        if run_id not in self._last:
            keys = self._client.get_run(run_id).data.metrics
            history = {key: self._client.get_metric_history(run_id, key) for key in keys}
            self._last[run_id] = {key: max(metric.step for metric in history[key]) for key in keys}
        return self._last[run_id]

    def send(self, run_id: str, points: Sequence[Point]) -> None:
        """Log points in batches the store accepts."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        last = self._last.setdefault(run_id, {})
        for begin in range(0, len(points), _METRICS_A_BATCH):
            batch = points[begin : begin + _METRICS_A_BATCH]
            self._client.log_batch(run_id, [Metric(p.key, p.value, now, p.step) for p in batch])
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
        """Move a run to the store's bin."""
        self._client.delete_run(run_id)


def redact(text: str) -> str:
    """`text` without the user names and passwords that URIs in it carry."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _reach(uri: str) -> Path | None:
    """Connect to a database store once, since MLflow would retry for most of an hour before it gives up.

    Returns:
        Where artifacts go: beside a sqlite file; ``None`` leaves it to the store.
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
    return Path(engine.url.database).resolve().parent / "mlartifacts"


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
