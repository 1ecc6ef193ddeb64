"""The workers of a study as tasks of a Ray cluster, which finds each a machine with a free core or GPU.

Ray only places and restarts them: they claim cells by leases (`benchmark.cells`) like every worker, so the results
folder, the working directory and the suite must be there on all machines, by the same path.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmark.cells import Cell, RunCell, owner, running
from benchmark.errors import InputError
from benchmark.installing import install_line
from benchmark.workers import ONE_THREAD, WorkersFailedError, default_workers, serve


@dataclass(frozen=True)
class StopFile:
    """A request to stop that every machine sees, in the place of an event."""

    path: Path

    def is_set(self) -> bool:
        """Whether the request was made."""
        return self.path.exists()

    def wait(self, timeout: float) -> bool:
        """Wait `timeout` seconds; whether the request was made."""
        time.sleep(timeout)
        return self.is_set()


def connect(address: str, gpus: float = 0.0) -> int:
    """Connect to the cluster at `address` (``auto`` finds one, ``local`` makes one here); how many workers it holds.

    Args:
        address: of the cluster. gpus: of each worker.

    Raises:
        InputError: Ray is missing, there is no such cluster, or it has too few GPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(f"Ray is missing ({error})", key="--ray", value=address, remedy=install_line("ray")) from error
    local: dict[str, Any] = {"num_cpus": default_workers(), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, log_to_driver=False, runtime_env={"env_vars": ONE_THREAD}, **local)
    except (ConnectionError, ValueError) as error:
        remedy = "Start one with `ray start --head` and give this shell its token, or use --ray local"
        raise InputError(f"no Ray cluster there ({error})", key="--ray", value=address, remedy=remedy) from error
    resources = ray.cluster_resources()
    found = int(resources.get("GPU", 0) / gpus) if gpus else int(resources.get("CPU", 0))
    if found < 1:
        what = f"the cluster has {resources.get('GPU', 0):g} GPUs and {resources.get('CPU', 0):g} cores"
        raise InputError(what, key="--gpus-per-worker", value=gpus, remedy="Lower it, or add machines")
    return found


@dataclass
class RayPool:
    """The same as `benchmark.workers.Pool` on the cluster that `connect` found.

    Attributes:
        cells: all cells of the study. count: how many workers run at a time. invocation: its name.
        log: file for what workers print outside a cell. run: replaces `benchmark.run.run_cell`.
        gpus: GPUs of each worker; a fraction shares one.
    """

    cells: Sequence[Cell]
    count: int
    invocation: str
    log: Path
    run: RunCell | None = None
    gpus: float = 0.0
    _tasks: list[Any] = field(default_factory=list)
    _deaths: int = 0
    _stop: StopFile = field(init=False)

    def __post_init__(self) -> None:
        self.cells = [replace(cell, folder=cell.folder.absolute()) for cell in self.cells]
        self._stop = StopFile(self.log.absolute().with_name(f".stop-{self.invocation}"))

    def start(self) -> None:
        """Start the workers."""
        for _ in range(self.count):
            self._start_one()

    def poll(self) -> bool:
        """Notice workers that ended, replace those that died, and say whether any is alive.

        Raises:
            WorkersFailedError: workers die again and again.
        """
        import ray
        from ray.exceptions import RayError

        ended, self._tasks = ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0) if self._tasks else ([], [])
        for task in ended:
            try:
                ray.get(task)
            except RayError as error:
                if not self._stop.is_set():
                    self._bury(error)
        return bool(self._tasks)

    def stop(self) -> None:
        """Ask every worker to finish its step and save."""
        self._stop.path.touch()

    def kill(self) -> None:
        """End every worker at once, and leave the cluster."""
        import ray

        for task in self._tasks:
            with contextlib.suppress(ValueError):
                ray.cancel(task, force=True)
        self._tasks.clear()
        ray.shutdown()
        self._stop.path.unlink(missing_ok=True)

    def _start_one(self) -> None:
        import ray

        # A process of its own for each worker, as torch keeps memory; leases replace Ray's retries.
        task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0, max_calls=1)(_worker)
        log = self.log.absolute()
        self._tasks.append(task.remote(str(Path.cwd()), self.cells, self.invocation, log, self._stop, self.run))

    def _bury(self, error: Exception) -> None:
        """Record the death of a worker with the cell it was running; a cell elsewhere is taken over when stale."""
        self._deaths += 1
        if self._deaths > 2 + 2 * len(self.cells):
            self.kill()
            raise WorkersFailedError(f"workers on the cluster die ({error}); see {self.log}")
        for cell in self.cells:
            if cell.result() is None and owner(cell.folder) is not None and not running(cell.folder):
                cell.mark_failed(self.invocation, f"its worker died ({type(error).__name__})")
        self._start_one()


def _worker(
    directory: str, cells: Sequence[Cell], invocation: str, log: Path, stop: StopFile, run: RunCell | None
) -> None:
    os.chdir(directory)
    serve(cells, invocation, log, stop, run)
