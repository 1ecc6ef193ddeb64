"""Worker processes of a study: each claims a missing cell, runs it, and looks for the next.

Processes are spawned, never forked (a forked torch hangs), and have one thread each: two OpenMP threads on a
loaded machine are several times slower than one. Workers ignore Ctrl-C; their parent tells them to stop, and
they watch that it is alive.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol

import psutil

from benchmark.cells import Job, Lease, LeaseLostError, RunCell, claim_next, left_by
from benchmark.errors import RunError, StorageError

IDLE_SECONDS = 0.5
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class Stop(Protocol):
    """A request to stop, as workers see it."""

    def is_set(self) -> bool:
        """Whether it was made."""
        ...

    def wait(self, timeout: float) -> bool:
        """Wait for it at most `timeout` seconds; whether it was made."""
        ...


class Workers(Protocol):
    """Workers of an invocation, wherever they run (`Pool`, `benchmark.ray_workers.RayPool`)."""

    def start(self) -> None:
        """Start them."""

    def poll(self) -> bool:
        """Replace those that died; whether any is alive."""
        ...

    def stop(self) -> None:
        """Ask every one to finish its step and save."""

    def kill(self) -> None:
        """End every one at once."""


class WorkersFailedError(RunError):
    """Workers die before they get to a cell."""


def default_workers() -> int:
    """Cores this process may use: its affinity, cut by the quota of its control group (containers)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def work(cells: Sequence[Job], invocation: str, log: Path, stop: Event, run: RunCell | None = None) -> None:
    """Body of a worker process: run cells until none is left that this invocation has not tried.

    Cells that other processes hold are waited for, so that a dead owner's cell is taken over.
    """
    # Children inherit an ignored signal but not a handler: helpers must survive Ctrl-C and obey `terminate`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        serve(cells, invocation, log, stop, run)
    except (OSError, StorageError):
        traceback.print_exc()
        sys.exit(os.EX_IOERR)


def serve(cells: Sequence[Job], invocation: str, log: Path, stop: Stop, run: RunCell | None) -> None:
    """Claim and run cells until none is left that this invocation has not tried, or `stop` is set."""
    with _output_to(log):
        train = run or _run_cell()
        left = list(cells)
        while not _told(stop):
            left = [cell for cell in left if cell.result() is None and cell.failure(invocation) is None]
            if not left:
                return
            found = claim_next(left, lambda cell: cell.failure(invocation) is not None)
            if found is None:
                stop.wait(IDLE_SECONDS)
                continue
            cell, lease = found
            with lease:
                _attempt(cell, lease, invocation, stop, train)


def _run_cell() -> RunCell:
    from benchmark.run import run_cell  # torch, which the parent does not need

    return run_cell


def _attempt(cell: Job, lease: Lease, invocation: str, stop: Stop, run: RunCell) -> None:
    stopping = False

    def should_stop() -> bool:
        nonlocal stopping
        if not lease.held:
            raise LeaseLostError(f"{cell.folder.name} has a new owner")
        stopping = _told(stop)
        return stopping

    with _output_to(cell.folder / "run.log"):
        try:
            cell.execute(run, should_stop, lease.fence)
            cell.clear_failure()
        except Exception as error:
            # Once told to stop, a run ends by raising; whatever else went wrong shows when it is resumed.
            if stopping:
                return
            traceback.print_exc()
            # A sleeper whose cell was taken over notices by what it cannot write; the cell is not its to judge.
            if lease.held and not isinstance(error, LeaseLostError):
                cell.mark_failed(invocation, f"{type(error).__name__}: {error}")


def _told(stop: Stop) -> bool:
    parent = multiprocessing.parent_process()
    return stop.is_set() or (parent is not None and not parent.is_alive())


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what this process prints, C libraries included, to the file at `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number, _ in kept:
            os.dup2(target, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(target)


@dataclass
class Pool:
    """The worker processes of this invocation.

    Attributes:
        cells: all cells of the study, in the order in which to run them.
        count: how many workers run at a time.
        invocation: names this invocation; a cell that fails in it is not tried again by it.
        log: file for what workers print outside a cell.
        run: replaces `benchmark.run.run_cell`; must be importable by name.
        deaths: how many worker processes a cell may take down before it counts as failed.
    """

    cells: Sequence[Job]
    count: int
    invocation: str
    log: Path
    run: RunCell | None = None
    deaths: int = 1
    _alive: list[tuple[SpawnProcess, Event]] = field(default_factory=list)
    _stopping: bool = False
    _false_starts: int = 0
    _died: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start the workers."""
        for _ in range(self.count):
            self._start_one()

    def poll(self) -> bool:
        """Notice workers that ended, replace those that died, and say whether any is alive.

        Raises:
            WorkersFailedError: workers die without having claimed a cell.
            StorageError: a worker cannot write even that a cell failed.
        """
        for process, stop in list(self._alive):
            code = process.exitcode
            if code is None:
                continue
            self._alive.remove((process, stop))
            if code == os.EX_IOERR and not self._stopping:
                self.kill()
                what = f"worker processes cannot write there (see {self.log})"
                raise StorageError(
                    self.log.parent, what, "Free some space or make it writable; the same command goes on"
                )
            if code != 0 and not self._stopping:
                self._bury(process, code)
                self._start_one()
        return bool(self._alive)

    def stop(self) -> None:
        """Ask every worker to finish its step and save."""
        self._stopping = True
        for _, stop in self._alive:
            stop.set()

    def kill(self) -> None:
        """End every worker, and what it started, at once."""
        self._stopping = True
        helpers: list[psutil.Process] = []
        for process, _ in self._alive:
            with contextlib.suppress(psutil.Error):
                helpers += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        for helper in helpers:
            with contextlib.suppress(psutil.Error):
                helper.kill()
        for process, _ in self._alive:
            process.join()
        self._alive.clear()

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")
        # One event a worker: a worker killed while it reads a shared one would block all others.
        stop = context.Event()
        process = context.Process(target=work, args=(self.cells, self.invocation, self.log, stop, self.run))
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ.update(ONE_THREAD)
        try:
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        self._alive.append((process, stop))

    def _bury(self, process: SpawnProcess, code: int) -> None:
        """Record the death of a worker with the cell it was running."""
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        mine = [cell for cell in self.cells if cell.result() is None and left_by(cell.folder, process.pid or 0)]
        self._died.update(cell.folder.name for cell in mine)
        for cell in mine:
            if self._died[cell.folder.name] < self.deaths:
                continue  # its lease is stale: another worker goes on from the last checkpoint
            cell.mark_failed(self.invocation, f"its worker process died ({cause})")
        self._false_starts += not mine
        if self._false_starts > 2:
            self.kill()
            raise WorkersFailedError(f"worker processes end before they run anything ({cause}); see {self.log}")
