from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.errors import InputError, StorageError
from benchmark.jsonl import (
    append_rows,
    atomic_write_json,
    atomic_write_text,
    drop_torn_line,
    dumps,
    read_rows,
    rows_with_offsets,
)

ROWS: list[dict[str, Any]] = [{"row": 0, "fate": "a"}, {"row": 1, "fate": None}, {"row": 2, "text": "é\n"}]


def test_rows_come_back_in_order_and_appending_extends(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_rows(path, ROWS[:1])
    append_rows(path, ROWS[1:])
    assert read_rows(path) == (ROWS, path.stat().st_size)


def test_bytes_are_canonical(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_rows(path, [{"b": 1.5, "a": [True, None]}])
    assert path.read_bytes() == b'{"b":1.5,"a":[true,null]}\n'


def test_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl", 7) == ([], 7)


@given(cut=st.integers(0, 80))
def test_a_torn_record_reads_as_its_whole_lines_and_goes_on_when_the_rest_arrives(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "ledger.jsonl"
    whole = "".join(dumps(row) + "\n" for row in ROWS).encode()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    first, offset = read_rows(path)
    assert first == ROWS[: whole[:cut].count(b"\n")]
    path.write_bytes(whole)
    rest, end = read_rows(path, offset)
    assert first + rest == ROWS
    assert end == len(whole)


def test_offsets_mark_the_end_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_rows(path, ROWS)
    offsets = [offset for _, offset in rows_with_offsets(path)]
    assert [read_rows(path, offset)[0] for offset in offsets] == [ROWS[1:], ROWS[2:], []]


def test_writer_cuts_a_torn_line_before_it_appends(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_rows(path, ROWS[:2])
    with path.open("ab") as file:
        file.write(b'{"row": 2, "te')
    drop_torn_line(path)
    append_rows(path, ROWS[2:])
    assert read_rows(path)[0] == ROWS


@pytest.mark.parametrize("damage", [b"{'row': 1}\n", b"[1]\n", b"\n", b"\xff\xfe\n"])
def test_damage_is_named_by_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    append_rows(path, ROWS)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(damage)
    for offset in (0, size):
        with pytest.raises(InputError) as caught:
            read_rows(path, offset)
        assert f"{path}:4" in str(caught.value)


def test_numbers_that_json_lacks_are_refused_and_leave_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        append_rows(path, [{"loss": 1.0}, {"loss": float("nan")}])
    assert not path.exists()


def test_atomic_write_replaces_whole_files_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "progress.json"
    atomic_write_json(path, {"state": "running"})
    atomic_write_json(path, {"state": "done"})
    assert json.loads(path.read_text()) == {"state": "done"}
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_replacement_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "progress.json"
    atomic_write_text(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"No space left on device\. Free some space"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
