"""MLflow follows the files: one parent run per results folder, one child run per cell, metric step = cost.

The files of the cells are the record; this mirror reads on from byte offsets and sends what is new in
batches. Where it stands is kept in ``mlflow_state.json`` beside the results, written after the store has
answered. A crash in between is mended by asking the store for the last step of every metric before the first
batch, since a step logged twice would be two points. One mirror at a time writes for a folder (a file lock);
others wait their turn. A store that does not answer never stops training: the mirror falls behind, says so
once, and catches up at a later `sync`.

An invocation that resumes a folder goes on with the folder's parent run, so a study is one tree however
often it was interrupted.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import textwrap
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json
from benchmark.mirror_points import at_equal_cost, fresh
from benchmark.mirror_record import Cell, Cursor, Status, find_cells, flatten, read_json, unsent
from benchmark.mirror_store import Store, redact
from benchmark.seal import sealed

STATE = "mlflow_state.json"
LOCK = ".mlflow_state.lock"
RECORDS = ("evaluation.jsonl", "metrics.jsonl", "allocation.jsonl", "timings.jsonl", "result.json")
TRACES = "traces.jsonl"  # only figures of single tokens need it, and older runs have none
"""What tables are made of: kept with a finished run, so that `analysis.from_mlflow` needs nothing else."""
_log = logging.getLogger("rolloutbench.mirror")


@dataclass
class _Run:
    """How far one run has got in the store."""

    run_id: str = ""
    described: bool = False
    status: str = ""
    cursors: dict[str, Cursor] = field(default_factory=dict)
    tips: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass
class _State:
    """What ``mlflow_state.json`` holds; `key` tags every run of this folder, before the first exists."""

    store: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    parent: _Run = field(default_factory=_Run)
    cells: dict[str, _Run] = field(default_factory=dict)

    @property
    def runs(self) -> dict[str, _Run]:
        """All runs by name; the parent's is ''."""
        return {"": self.parent, **self.cells}

    @property
    def ids(self) -> dict[str, str]:
        """Their ids in the store."""
        return {name: run.run_id for name, run in self.runs.items()}

    @classmethod
    def load(cls, path: Path, store: str) -> _State:
        """The state left by an earlier process, or a new one if that belongs to another store."""
        data = read_json(path)
        if data is None or data["store"] != store:
            return cls(store)
        cells = {name: _run(run) for name, run in data["cells"].items()}
        return cls(store, data["key"], _run(data["parent"]), cells)


def _run(data: Mapping[str, Any]) -> _Run:
    cursors = {name: Cursor(**value) for name, value in data["cursors"].items()}
    tips = {key: (int(step), float(value)) for key, (step, value) in data.get("tips", {}).items()}
    return _Run(**{**data, "cursors": cursors, "tips": tips})


class Mirror:
    """Carries one results folder (or the folder of a single run) to an MLflow experiment.

    Args:
        tracking_uri: any MLflow tracking URI, for instance ``sqlite:///mlflow.db`` or ``http://127.0.0.1:5000``.
        study_dir: a folder with ``plan.json`` and ``cells/``, or the folder of one run.
        experiment: name of the MLflow experiment; created if it is not there.
    """

    patience = 10.0
    """After a failure the store is left alone for this many times as long as the failed attempt took."""

    def __init__(self, tracking_uri: str, study_dir: Path, experiment: str) -> None:
        self._uri, self._folder, self._experiment = tracking_uri, study_dir, experiment
        # Fingerprinted, because a tracking URI may hold a password.
        self._fingerprint = hashlib.sha256(f"{tracking_uri}\0{experiment}".encode()).hexdigest()[:16]
        self._store: Store | None = None
        self._state = _State(self._fingerprint)
        self._lock: int | None = None
        self._behind = False
        self._next_try = 0.0

    def sync(self) -> bool:
        """Send what is new. Idempotent; never raises for the store's sake.

        Returns:
            Whether the store now has all that the files say.
        """
        if time.monotonic() < self._next_try:
            return False
        return self._attempt(self._sync)

    def close(self) -> bool:
        """Send what is new, give every run its final status, log the report and its parts, free the folder.

        A cell that is still running is marked killed; a later mirror of the folder takes it up again.
        """
        try:
            return self._attempt(self._finish)
        finally:
            self._release()

    def rebuild(self) -> bool:
        """Make every run anew from the files, and delete (recoverably) those that this folder had before."""

        def action() -> None:
            store = self._open()
            for run_id in store.runs(self._state.key, {}).values():
                store.delete(run_id)
            self._store, self._state = None, _State(self._fingerprint)
            self._save()
            self._finish()

        try:
            return self._attempt(action)
        finally:
            self._release()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one attempt ------------------------------------------------------------------------------------

    def _attempt(self, action: Callable[[], object]) -> bool:
        begin = time.monotonic()
        try:
            if not self._acquire():
                return False
            action()
        # Whatever a tracking store, its database or the network throws: it must not reach training.
        except Exception as error:
            self._store = None
            self._next_try = time.monotonic() + self.patience * (time.monotonic() - begin)
            self._complain(error)
            return False
        if self._behind:
            _log.warning("MLflow has caught up with %s", self._folder)
            self._behind = False
        self._next_try = 0.0
        return True

    def _complain(self, error: Exception) -> None:
        if not self._behind:
            reason = redact(f"{type(error).__name__}: {error}").splitlines()[0]
            _log.warning(
                "MLflow (%s) falls behind: %s. The files in %s are complete; this is retried, and "
                "`rolloutbench mirror --rebuild` restores it",
                redact(self._uri),
                textwrap.shorten(reason, 200),
                self._folder,
            )
        self._behind = True

    def _acquire(self) -> bool:
        """Whether this mirror is the folder's writer; it stays so until it is closed or its process ends."""
        if self._lock is None:
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            self._lock = descriptor
        return True

    def _release(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # a forked worker may still hold the descriptor
            os.close(self._lock)
        self._lock, self._store = None, None

    def _open(self) -> Store:
        """The store, with the state that belongs to it; what somebody deleted there is begun anew."""
        if self._store is None:
            store = Store(self._uri, self._experiment)
            state = _State.load(self._folder / STATE, self._fingerprint)
            known = store.runs(state.key, state.ids)
            if state.parent.run_id and "" not in known:
                state, known = _State(self._fingerprint), {}
            # A run made just before a crash is not in the state, but in the store under its key.
            runs = {name: _Run(run_id) for name, run_id in known.items()}
            runs |= {name: run for name, run in state.runs.items() if run.run_id == known.get(name)}
            state.parent = runs.pop("", _Run())
            state.cells = runs
            self._state, self._store = state, store
            self._save()
            self._begin(store)
        return self._store

    def _save(self) -> None:
        atomic_write_json(self._folder / STATE, sealed(asdict(self._state)))

    # -- following --------------------------------------------------------------------------------------

    def _begin(self, store: Store) -> None:
        """The parent run; its plan goes into tags, because a study may grow and parameters are for ever."""
        plan = read_json(self._folder / "plan.json") or {}
        parent = self._state.parent
        if not parent.run_id:
            begun = [begin for cell in find_cells(self._folder) if (begin := Status.of(cell.folder).begin)]
            name = str(plan.get("study", self._folder.name))
            parent.run_id = store.create(name, self._tags("", {}), min(begun, default=None))
            parent.status = "RUNNING"
            self._save()
        store.tag(parent.run_id, flatten({key: plan[key] for key in plan if key != "cells"}))
        store.artifact(parent.run_id, self._folder / "plan.json")
        # Of a sweep, whose every setting is an arm of its own, the arms that it tunes.
        by, groups = ("group", plan["groups"]) if "groups" in plan else ("arm", plan.get("arms", []))
        store.show(str(plan.get("primary_currency", "tokens_generated")), groups, by)

    def _sync(self) -> None:
        _, damaged = self._follow()
        if damaged is not None:
            raise damaged

    def _follow(self) -> tuple[list[Cell], InputError | None]:
        """Every cell that has begun, and the last damaged record: one must not hold up the others."""
        store, parent = self._open(), self._state.parent
        cells = find_cells(self._folder)
        damaged: InputError | None = None
        for cell in cells:
            run = self._state.cells.setdefault(cell.name, _Run())
            if run.status == "FINISHED":
                continue
            if parent.status != "RUNNING":
                self._set_status(store, parent, "RUNNING", None)
            try:
                self._follow_cell(store, cell, run)
            except InputError as error:
                damaged = error
        return cells, damaged

    def _follow_cell(self, store: Store, cell: Cell, run: _Run) -> None:
        # The status is read before the rows: a run that has finished by now has written all of them.
        status = Status.of(cell.folder)
        before = asdict(run)
        if not run.run_id:
            tags = self._tags(cell.name, cell.tags) | {"mlflow.parentRunId": self._state.parent.run_id}
            name = f"{cell.config['arm']} seed {cell.config['seed']}"
            run.run_id = store.create(name, tags, status.begin)
            self._save()
        if not run.described:
            store.describe(run.run_id, flatten(cell.config))
            store.datasets(run.run_id, cell.config["task"])
            store.artifact(run.run_id, cell.folder / "config.yaml")
            run.described = True
        points, cursors = unsent(cell, run.cursors, status.name == "FINISHED")
        curves, tips = at_equal_cost(points, run.tips, cell.config["budget"]["amount"])
        if points:
            store.send(run.run_id, fresh([*points, *curves], store.last_steps(run.run_id)))
        run.cursors, run.tips = cursors, tips
        if status.name == "FINISHED" != run.status:
            for name in (*RECORDS, TRACES):
                store.artifact(run.run_id, cell.folder / name)
            store.checkpoint(run.run_id, cell.folder / "policy", cell.name, max(point.step for point in points))
        if status.name != run.status:
            if status.message:
                store.tag(run.run_id, {"message": status.message})
            self._set_status(store, run, status.name, status.end)
        if asdict(run) != before:
            self._save()

    def _finish(self) -> None:
        cells, damaged = self._follow()
        store, parent = self._open(), self._state.parent
        store.runs(self._state.key, self._state.ids)
        plan = read_json(self._folder / "plan.json")
        for cell in cells:
            run = self._state.cells[cell.name]
            if run.status == "RUNNING":
                self._set_status(store, run, "KILLED", None)
        states = [self._state.cells[cell.name].status for cell in cells if not cell.ended]
        planned = len(cells) if plan is None else sum("ended" not in cell for cell in plan["cells"])
        complete = "FINISHED" if states.count("FINISHED") == planned else "KILLED"
        outcome = "FAILED" if "FAILED" in states else complete
        ended = [end for cell in cells if (end := Status.of(cell.folder).end)]
        for pattern in ("*.md", "*.html", "*.yaml", "plan.json", "gradient_variance.json", "tables", "figures"):
            for path in sorted(self._folder.glob(pattern)):
                store.artifact(parent.run_id, path)
        if parent.status != outcome:
            self._set_status(store, parent, outcome, max(ended, default=None))
        self._save()
        if damaged is not None:
            raise damaged

    def _set_status(self, store: Store, run: _Run, name: str, end: int | None) -> None:
        store.set_status(run.run_id, name, end)
        run.status = name

    def _tags(self, cell: str, tags: Mapping[str, str]) -> dict[str, str]:
        return {**tags, "rolloutbench.key": self._state.key, "rolloutbench.cell": cell}
