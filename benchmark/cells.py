"""The cells of a study on disk: which are done, and who may run the others.

A cell is one run (arm, seed) in its own folder. Workers, on one machine or on many that share a disk, claim
cells through lease files and need no coordinator:

* Leases of a cell are numbered. Whoever creates ``lease/<n+1>`` (O_CREAT | O_EXCL) after lease n was released
  or went stale owns the cell; a file system lets exactly one succeed. Numbers are never used again, so a slow
  process that judged lease n long ago cannot take the cell from the owner of n+1, as renaming or deleting
  lease files would let it.
* The owner's heartbeat is its lease's mtime. A lease is stale when that stopped, measured by the file
  system's own clock, or at once when its process is known to be dead (same host, boot and pid namespace).
* An owner that was only asleep sees the higher number (`Lease.held`) and leaves the cell alone from then on. What
  would hurt its heir, to begin the records and to write checkpoints and ``result.json``, is done under a lock and only
  by the latest lease (`Lease.fence`). Where a file system has no locks, a process that falls asleep between the look
  and the write is the one case left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import psutil

from benchmark.config import RunConfig
from benchmark.errors import InputError, RunError, storing
from benchmark.jsonl import atomic_write_json
from benchmark.layers import read_yaml, validate
from benchmark.machine import machine
from benchmark.seal import sealed

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 90.0
LOCK = "lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


Fence = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes a context that only the present owner of a cell enters, one process at a time (`Lease.fence`)."""


class RunCell(Protocol):
    """What runs or resumes a cell (`benchmark.run.run_cell`)."""

    def __call__(self, config: RunConfig, out: Path, *, should_stop: Callable[[], bool], fence: Fence) -> None:
        """Run `config` into `out`, ``result.json`` last; raise `Interrupted` after a checkpoint once `should_stop`.

        Records are begun, checkpoints and the result are written inside `fence`.
        """


class Job(ABC):
    """Work that one process at a time does in `folder`; its ``result.json`` is written last and means done."""

    folder: Path

    @property
    @abstractmethod
    def run_hash(self) -> str:
        """Identity of the work; ``result.json`` repeats it."""

    @abstractmethod
    def execute(self, run: RunCell, should_stop: Callable[[], bool], fence: Fence) -> None:
        """Do the work or go on with it; `run` trains."""

    def result(self) -> dict[str, Any] | None:
        """``result.json`` if the work is done, else None.

        Raises:
            InputError: the folder holds other work.
        """
        found = read_json(self.folder / "result.json")
        if found is not None and found.get("run_hash") != self.run_hash:
            raise self._taken()
        return found

    def _taken(self) -> InputError:
        return InputError(
            "the folder holds a run with another configuration",
            file=self.folder,
            remedy="Choose another folder, or delete this one",
        )

    def mark_failed(self, invocation: str, message: str) -> None:
        """Say why the run failed; this invocation's workers then leave the job alone, the next retries."""
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.folder / "failure.json", {"invocation": invocation, "error": message})

    def clear_failure(self) -> None:
        """Forget an earlier failure."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def failure(self, invocation: str) -> str | None:
        """Why the run failed in this invocation, or None."""
        found = read_json(self.folder / "failure.json")
        return str(found["error"]) if found is not None and found.get("invocation") == invocation else None


J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Cell(Job):
    """One run and the folder that holds its record."""

    config: RunConfig
    folder: Path

    @classmethod
    def of(cls, study_folder: Path, config: RunConfig) -> Cell:
        """The cell of `config` in a study's results; its name carries the hash, so runs never mix."""
        name = f"{config.arm}-s{config.seed}-{config.run_hash[:8]}"
        return cls(config, study_folder / "cells" / name)

    @cached_property
    def run_hash(self) -> str:
        """Identity of the run."""
        return self.config.run_hash

    def execute(self, run: RunCell, should_stop: Callable[[], bool], fence: Fence) -> None:
        """Run or resume the cell."""
        self.check()
        run(self.config, self.folder, should_stop=should_stop, fence=fence)

    def check(self) -> None:
        """Refuse a folder that another run, or a study, left its record in.

        Raises:
            InputError: ``config.yaml`` there has another hash, or is no configuration of this version; or there is a
                ``plan.json``.
        """
        if (self.folder / "plan.json").exists():
            what, remedy = "the folder holds a study, and a run would mix its record with that", "Choose another folder"
            raise InputError(what, file=self.folder, remedy=remedy)
        path = self.folder / "config.yaml"
        if not path.exists():
            return
        try:
            same = validate(RunConfig, read_yaml(path)).run_hash == self.run_hash
        except InputError:
            same = False
        if not same:
            raise self._taken()


class LeaseLostError(RunError):
    """Another process took the cell over while this one was not breathing."""


class Lease:
    """The right to run a cell, kept alive by a thread until it is released.

    Use as a context manager. `held` turns false once another process took the cell over.
    """

    def __init__(self, path: Path, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        self.path = path
        self._heartbeat = heartbeat
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {path.parent.parent.name}", daemon=True)
        self._thread.start()

    @property
    def held(self) -> bool:
        """Whether this is still the cell's latest lease."""
        return _latest(self.path.parent) == int(self.path.name)

    @contextlib.contextmanager
    def fence(self) -> Iterator[None]:
        """Hold the cell's lock as its owner: an heir that comes meanwhile waits, and this process's later writes fail.

        Raises:
            LeaseLostError: another process took the cell over.
            StorageError: the folder cannot be written.
        """
        with storing(self.path), contextlib.ExitStack() as stack:
            lock = os.open(self.path.with_name(LOCK), os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not self.held:
                raise LeaseLostError(f"{self.path.parent.parent} has a new owner, or was deleted")
            yield

    def release(self) -> None:
        """Let others have the cell."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):  # deleted with its folder
            self.path.with_suffix(".released").touch()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat):
            # A disk that is away for a moment must not end the heartbeat.
            with contextlib.suppress(OSError):
                os.utime(self.path)


def claim(folder: Path, *, stale_after: float = STALE_SECONDS, heartbeat: float = HEARTBEAT_SECONDS) -> Lease | None:
    """Try to become the only owner of the cell in `folder` (made if missing); None if somebody else is.

    Args:
        folder: the cell's folder.
        stale_after: seconds without a heartbeat after which an owner counts as dead; well above `heartbeat`.
        heartbeat: seconds between two heartbeats of the new lease.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storing(folder):
        return _claim(folder / "lease", stale_after, heartbeat)


def _claim(leases: Path, stale_after: float, heartbeat: float) -> Lease | None:
    leases.mkdir(parents=True, exist_ok=True)
    latest = _latest(leases)
    current = leases / str(latest)
    if latest >= 0 and not (current.with_suffix(".released").exists() or _stale(current, stale_after)):
        return None
    path = leases / str(latest + 1)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    me = {"machine": machine(), "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(sealed(me), file)
    return Lease(path, heartbeat)


def claim_next(
    cells: Iterable[J], skip: Callable[[J], bool], *, stale_after: float = STALE_SECONDS
) -> tuple[J, Lease] | None:
    """Claim the first cell that is neither done nor skipped nor somebody else's."""
    for cell in cells:
        if skip(cell) or cell.result() is not None:
            continue
        lease = claim(cell.folder, stale_after=stale_after)
        # The last owner may have finished between the first look and the claim.
        if lease is not None and cell.result() is not None:
            lease.release()
        elif lease is not None:
            return cell, lease
    return None


def owner(folder: Path) -> dict[str, Any] | None:
    """Host and pid of the cell's present owner as its lease states them, or None if the cell is free."""
    leases = folder / "lease"
    latest = _latest(leases)
    if latest < 0 or (leases / f"{latest}.released").exists():
        return None
    return read_json(leases / str(latest))


def running(folder: Path, *, stale_after: float = STALE_SECONDS) -> bool:
    """Whether somebody owns the cell and is alive, as far as this machine can tell by its own clock; writes nothing."""
    leases = folder / "lease"
    current = leases / str(_latest(leases))
    return owner(folder) is not None and not _dead(current) and time.time() - current.stat().st_mtime <= stale_after


def left_by(folder: Path, pid: int) -> bool:
    """Whether the process `pid` of this machine, now gone, had claimed the cell and never released it."""
    for lease in (folder / "lease").glob("*"):
        if lease.name.isdecimal() and not lease.with_suffix(".released").exists():
            holder = read_json(lease) or {}
            if holder.get("machine") == machine() and holder.get("pid") == pid:
                return True
    return False


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None if it is missing or half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _latest(leases: Path) -> int:
    """Highest lease number, -1 if there is none."""
    try:
        names = [path.name for path in leases.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return -1
    return max((int(name) for name in names if name.isdecimal()), default=-1)


def _stale(lease: Path, after: float) -> bool:
    """Whether the lease's process is known to be dead, or its heartbeat stopped `after` seconds ago."""
    if _dead(lease):
        return True
    probe = lease.with_name(f".now-{uuid.uuid4().hex}")
    try:
        # A fresh file tells the time of the clock that stamps heartbeats, whichever machine that is.
        probe.touch()
        return probe.stat().st_mtime - lease.stat().st_mtime > after
    finally:
        probe.unlink(missing_ok=True)


def _dead(lease: Path) -> bool:
    holder = read_json(lease) or {}
    pid = holder.get("pid")
    return holder.get("machine") == machine() and isinstance(pid, int) and not psutil.pid_exists(pid)
