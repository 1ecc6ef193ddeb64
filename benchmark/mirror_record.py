"""What the files of a run say, in the terms of a tracking store: points, parameters, tags and status.

Nothing here talks to a store. A cell's folder is the record; `benchmark.mirror` carries what is read here
to MLflow.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.config import identity
from benchmark.errors import InputError
from benchmark.jsonl import Row, rows_with_offsets
from benchmark.mirror_points import Point, clean, evaluation_points, metric_points, result_points, timing_points
from benchmark.opening import inside, stored_config

_MAX_VALUE = 6000
_TAIL = 64


@dataclass(frozen=True)
class Cell:
    """A run of one arm with one seed: its folder and what names it in the store."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    currency: str
    planned: Mapping[str, Any] = field(default_factory=dict)
    """What ``plan.json`` says of it."""

    @property
    def ended(self) -> bool:
        """Whether its trial of a sweep was pruned or diverged: that is an outcome, not a fault."""
        return "ended" in self.planned

    @property
    def tags(self) -> dict[str, str]:
        """Identity of the cell."""
        seedless = {key: value for key, value in self.config.items() if key != "seed"}
        hashes = {"run_hash": identity(self.config), "plan_hash": identity(seedless)}
        named = ("study", "arm", "scale", "seed")
        group = {"group": str(self.planned["group"])} if "group" in self.planned else {}
        return hashes | group | {key: str(self.config[key]) for key in named if key in self.config}


@dataclass(frozen=True)
class Cursor:
    """How far a file was read, and a checksum of the bytes just before, which a rewritten file lacks."""

    offset: int = 0
    checksum: int = 0

    @classmethod
    def at(cls, path: Path, offset: int) -> Cursor:
        """The cursor behind the first `offset` bytes of a file."""
        begin = max(0, offset - _TAIL)
        with path.open("rb") as file:
            file.seek(begin)
            return cls(offset, zlib.crc32(file.read(offset - begin)))

    def rows(self, path: Path) -> list[tuple[Row, int]]:
        """Complete rows behind the cursor, each with its end; all rows if the file was rewritten."""
        same = self.offset == 0 or (path.exists() and Cursor.at(path, self.offset) == self)
        return rows_with_offsets(path, self.offset if same else 0)


def find_cells(study: Path) -> list[Cell]:
    """The cells of a results folder that have begun, in its plan's order; a single run is its own cell."""
    plan, planned = read_json(study / "plan.json"), dict[Path, Mapping[str, Any]]()
    if plan is not None:
        planned = {inside(study, cell["dir"]): cell for cell in plan["cells"]}
        folders = list(planned)
    elif (study / "config.yaml").exists():
        folders = [study]
    else:
        folders = sorted(path.parent for path in study.glob("cells/*/config.yaml"))
    cells = []
    for folder in folders:
        if not (folder / "config.yaml").exists():
            continue
        config = _config(folder / "config.yaml", (folder / "config.yaml").stat().st_mtime_ns)
        # A single run's folder may be used again for another configuration: that is another cell.
        name = folder.name if folder != study else f"{config['arm']}-s{config['seed']}-{identity(config)[:8]}"
        currency = (plan or {}).get("primary_currency") or config["budget"]["currency"]
        cells.append(Cell(name, folder, config, currency, planned.get(folder, {})))
    return cells


@functools.lru_cache(maxsize=1024)
def _config(path: Path, modified: int) -> dict[str, Any]:
    """A cell's configuration, parsed once: following 70 cells would spend its time on YAML."""
    return stored_config(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that is only ever replaced as a whole; ``None`` while there is none."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise InputError("not JSON", file=path, remedy="Restore it, or run the cell again") from None
    return value if isinstance(value, dict) else None


@dataclass(frozen=True)
class Status:
    """MLflow's word for the state of a cell, why it failed, and its begin and end in milliseconds."""

    name: str
    message: str = ""
    begin: int | None = None
    end: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Status:
        """The status that the files of a cell tell."""
        progress = read_json(folder / "progress.json") or {}
        failure = read_json(folder / "failure.json")
        begin, end = (_milliseconds(progress.get(key)) for key in ("started_at", "updated_at"))
        # The result is written last, so it outranks whatever an earlier attempt has left behind.
        if (folder / "result.json").exists():
            return cls("FINISHED", "", begin, end)
        if failure is not None:
            return cls("FAILED", str(failure.get("error", "")), begin, end)
        if progress.get("state") == "failed":
            return cls("FAILED", str(progress.get("message", "")), begin, end)
        if progress.get("state") == "interrupted":
            return cls("KILLED", "", begin, end)
        return cls("RUNNING", "", begin, None)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Parameters by dotted path; lists as JSON. A value beyond the store's limit is cut and says so."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(text) > _MAX_VALUE:
            note = "... (cut; whole in config.yaml)"
            text = text[: _MAX_VALUE - len(note)] + note
        flat[clean(f"{prefix}{key}")] = text
    return flat


def unsent(cell: Cell, cursors: Mapping[str, Cursor], done: bool) -> tuple[list[Point], dict[str, Cursor]]:
    """Points behind the cursors, ascending in step, and the cursors once these are sent.

    An evaluation is held back until it is certainly complete: a later one began, training went on, or the
    run finished (`done`).
    """
    moved = {name: Cursor() for name in ("metrics.jsonl", "timings.jsonl", "evaluation.jsonl")} | dict(cursors)
    points: list[Point] = []
    for name, read in (("timings.jsonl", timing_points), ("metrics.jsonl", metric_points)):
        path = cell.folder / name
        rows = moved[name].rows(path)
        points += [point for row, _ in rows for point in read(row, cell.currency)]
        if rows:
            moved[name] = Cursor.at(path, rows[-1][1])

    path = cell.folder / "evaluation.jsonl"
    evaluated = moved[path.name].rows(path)
    reached = max((int(row["cost"][cell.currency]) for row, _ in rows), default=-1)
    groups: dict[int, list[tuple[Row, int]]] = {}
    for row, offset in evaluated:
        groups.setdefault(int(row["point"]), []).append((row, offset))
    for number, group in groups.items():
        last = number == max(groups)
        if last and not done and reached <= int(group[0][0]["cost"][cell.currency]):
            break
        points += evaluation_points([row for row, _ in group], cell.currency, cell.config["evaluation"]["k"])
        moved[path.name] = Cursor.at(path, group[-1][1])
    if done:
        points += result_points(cell.folder, cell.currency)
    return sorted(points, key=lambda point: point.step), moved


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)
