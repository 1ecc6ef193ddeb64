"""Append-only JSONL records and atomic whole files: what is on disk survives a killed process.

A record grows by whole lines, one `write` a line, so a crash can tear only the last line; readers leave a
torn line alone until its end has arrived. Everything that is replaced rather than extended goes through a
temporary file, an fsync and a rename, so a reader sees the old content or the new, never half of it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmark.errors import InputError

Row = dict[str, Any]


def dumps(row: Mapping[str, Any]) -> str:
    """One line of canonical JSON without the newline: keys in the given order, no spaces, no NaN.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot say.
    """
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append `rows`, each with a single write, so that a crash leaves at most one torn line, the last."""
    lines = [(dumps(row) + "\n").encode() for row in rows]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for line in lines:
            _write_all(descriptor, line)
    finally:
        os.close(descriptor)


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
        except ValueError:
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
    """Replace the file at `path` by `text`, durably and in one step; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


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


def _sync_folder(folder: Path) -> None:
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
