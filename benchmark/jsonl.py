"""Append-only JSONL records and atomic whole files: what is on disk survives a killed process.

A record grows by whole lines, one `write` a line, so a crash can tear only the last line; readers leave a
torn line alone until its end has arrived. Everything that is replaced rather than extended goes through a
temporary file, an fsync and a rename, so a reader sees the old content or the new, never half of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmark.errors import InputError, StorageError, storing
from benchmark.machine import machine

Row = dict[str, Any]
PARTIAL = ".partial"
"""How the names of files end that are still being written."""


def dumps(row: Mapping[str, Any]) -> str:
    """One line of canonical JSON without the newline: keys in the given order, no spaces, no NaN.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot say.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append `rows`, each with a single write, so that a crash leaves at most one torn line, the last.

    Raises:
        StorageError: the file cannot be written.
    """
    record = Record(path)
    try:
        record.append(rows)
    finally:
        record.close()


class Record:
    """An append-only record and its one writer, which notices when the file at `path` is no longer the one it opened.

    So a run whose folder was deleted does not go on in a new file that lacks the first rows, and a process that slept
    while another took its run over writes into the file that the other left behind (`restart`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._end: Any = None

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append `rows`, each with a single write.

        Raises:
            StorageError: the file cannot be written, or is no longer this record's.
            ValueError: a value is NaN or infinite; then nothing is written.
        """
        lines = [(dumps(row) + "\n").encode() for row in rows]
        with storing(self.path):
            descriptor = self.open(self.path, os.O_CREAT) if self._descriptor is None else self._descriptor
            for line in lines:
                _write_all(descriptor, line)
        self.check()

    def open(self, path: Path, flags: int = 0) -> int:
        """Append to the file at `path` from now on, which is to be this record's; returns its descriptor."""
        self._descriptor = descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | flags, 0o644)
        self._end = weakref.finalize(self, os.close, descriptor)
        return descriptor

    def check(self) -> None:
        """Raise `StorageError` if the file at the path is not the one that this record has written to."""
        if self._descriptor is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._descriptor), self.path.stat())
        except OSError:
            same = False
        if not same:
            raise StorageError(self.path, "deleted or replaced while the run was writing to it")

    def sync(self) -> None:
        """Make what was appended durable."""
        if self._descriptor is not None:
            with storing(self.path):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; a later `append` opens it again."""
        if self._descriptor is not None:
            self._end()
            self._descriptor = None


def fingerprint(path: Path, size: int | None = None) -> tuple[int, str]:
    """Number and SHA-256 of the first `size` bytes of a file (all by default); a missing file has none."""
    if not path.exists():
        return 0, hashlib.sha256().hexdigest()
    with path.open("rb") as file:
        data = file.read(size) if size is not None else file.read()
    return len(data), hashlib.sha256(data).hexdigest()


def restart(path: Path, size: int, done: Path | None = None) -> Record:
    """Begin a new file at `path` with the first `size` bytes of the old one; processes that had it open keep the old.

    Returns:
        The record, with the new file already open: whoever sleeps from here on and is taken over writes into a file
        that nobody reads, and notices. Who was taken over before leaves the other's file alone.

    Args:
        done: a file whose presence means that the work is finished.

    Raises:
        StorageError: it cannot be written, is another process's by now, or the work is finished.
    """
    record = Record(path)
    with storing(path), contextlib.ExitStack() as stack:
        old = stack.enter_context(path.open("rb")) if path.exists() else None

        def ours() -> None:
            there = path.stat() if path.exists() else None
            known = None if old is None else os.fstat(old.fileno())
            same = there is None if known is None else there is not None and os.path.samestat(known, there)
            if not same or (done is not None and done.exists()):
                raise StorageError(path, "taken over by another process meanwhile")

        ours()
        if old is None:
            record.open(path, os.O_CREAT | os.O_EXCL)
        else:
            _replace(path, old.read(size), ours, record.open)
    return record


def read_rows(path: Path, offset: int = 0) -> tuple[list[Row], int]:
    """The complete rows from byte `offset` on and the offset behind the last of them.

    A last line without its newline is not read: the next call, from the returned offset, finds it whole.
    A missing file has no rows.

    Raises:
        InputError: a complete line is not a JSON object; the message names file and line.
    """
    rows = rows_with_offsets(path, offset)
    return [row for row, _ in rows], rows[-1][1] if rows else offset


def rows_with_offsets(path: Path, offset: int = 0) -> list[tuple[Row, int]]:
    """Like `read_rows`, with the offset behind each row, for readers that stop between two rows."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    rows: list[tuple[Row, int]] = []
    end = offset
    for index, line in enumerate(data.split(b"\n")[:-1]):
        end += len(line) + 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(
                "not a JSON object",
                file=path,
                line=_lines_before(path, offset) + index + 1,
                remedy="The record is damaged; restore it, or delete the run's folder and run it again",
            )
        rows.append((row, end))
    return rows


def drop_torn_line(path: Path) -> None:
    """Cut an unfinished last line off, as a writer must before it appends to a record it resumes."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`, durably and in one step; parent folders are made.

    Raises:
        StorageError: it cannot be written; the old content is still there.
    """
    atomic_write_bytes(path, text.encode())


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`, as `atomic_write_text` does."""
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)


def _replace(
    path: Path,
    data: bytes,
    allowed: Callable[[], None] = lambda: None,
    take: Callable[[Path], object] = lambda _: None,
) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_writer()}-", suffix=PARTIAL)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        take(temporary)
        allowed()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _writer() -> str:
    return f"{hashlib.sha256(machine().encode()).hexdigest()[:8]}-{os.getpid()}"


def clear_partial(folder: Path, *, owned: bool = False) -> None:
    """Remove what dead processes of this machine left half written in `folder`; what anyone left, if it is `owned`."""
    for path in folder.glob(f".*{PARTIAL}"):
        writer = re.search(r"\.([0-9a-f]{8})-(\d{1,9})-[^.]*\.partial$", path.name)
        dead = writer is not None and writer[1] == _writer()[:8] and not psutil.pid_exists(int(writer[2]))
        if not (owned or dead):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def atomic_write_json(path: Path, value: object) -> None:
    """Replace the file at `path` by `value` as indented JSON, durably and in one step.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    atomic_write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _lines_before(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        return file.read(offset).count(b"\n")


def sync_folder(folder: Path) -> None:
    """Make a rename durable; a file system that refuses to sync folders has only the rename itself."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
