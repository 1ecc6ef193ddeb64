"""What the files of a run say, in the terms of a tracking store: points, parameters, tags and status.

Nothing here talks to a store. A cell's folder is the record; `benchmark.mirror` carries what is read here
to MLflow.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmark.config import digest
from benchmark.jsonl import Row, rows_with_offsets

_MAX_VALUE = 6000
_TAIL = 64
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_\-. :/]")


@dataclass(frozen=True)
class Point:
    """One value of one metric; `step` is the training spend in the primary currency."""

    key: str
    value: float
    step: int


@dataclass(frozen=True)
class Cell:
    """A run of one arm with one seed: its folder and what names it in the store."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    currency: str

    @property
    def tags(self) -> dict[str, str]:
        """Identity of the cell."""
        seedless = {key: value for key, value in self.config.items() if key != "seed"}
        hashes = {"run_hash": digest(self.config), "plan_hash": digest(seedless)}
        named = ("study", "arm", "scale", "seed")
        return hashes | {key: str(self.config[key]) for key in named if key in self.config}


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
    plan = read_json(study / "plan.json")
    if plan is not None:
        folders = [study / str(cell["dir"]) for cell in plan["cells"]]
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
        name = folder.name if folder != study else f"{config['arm']}-s{config['seed']}-{digest(config)[:8]}"
        currency = (plan or {}).get("primary_currency") or config["budget"]["currency"]
        cells.append(Cell(name, folder, config, currency))
    return cells


@functools.lru_cache(maxsize=1024)
def _config(path: Path, modified: int) -> dict[str, Any]:
    """A cell's configuration, parsed once: following 70 cells would spend its time on YAML."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file that is only ever replaced as a whole; ``None`` while there is none."""
    if not path.exists():
        return None
    value = json.loads(path.read_text())
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
        flat[_clean(f"{prefix}{key}")] = text
    return flat


def unsent(cell: Cell, cursors: Mapping[str, Cursor], done: bool) -> tuple[list[Point], dict[str, Cursor]]:
    """Points behind the cursors, ascending in step for every key, and the cursors once these are sent.

    An evaluation is held back until it is certainly complete: a later one began, training went on, or the
    run finished (`done`).
    """
    moved = {name: Cursor() for name in ("metrics.jsonl", "evaluation.jsonl")} | dict(cursors)
    path = cell.folder / "metrics.jsonl"
    rows = moved[path.name].rows(path)
    points = [point for row, _ in rows for point in metric_points(row, cell.currency)]
    if rows:
        moved[path.name] = Cursor.at(path, rows[-1][1])

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
        points += result_points(cell)
    return points, moved


def metric_points(row: Row, currency: str) -> list[Point]:
    """One step's metrics and its cumulative spend in every currency, as ``cost/<currency>``."""
    spent = {f"cost/{name}": value for name, value in row["cost"].items()}
    return _points({**row.get("metrics", {}), **spent}, int(row["cost"][currency]))


def evaluation_points(rows: Sequence[Row], currency: str, ks: Iterable[int]) -> list[Point]:
    """Unbiased pass@k of one evaluation, per family and averaged over families; only where every n >= 2k.

    pass@k of an item with c of n samples correct is 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(str(row["family"]), []).append(row)
    least = min(int(row["n"]) for row in rows)
    values: dict[str, float] = {}
    for k in ks:
        if k > 1 and 2 * k > least:
            continue
        for family, items in families.items():
            each = [1 - math.comb(row["n"] - row["c"], k) / math.comb(row["n"], k) for row in items]
            values[f"eval/{family}_pass_at_{k}"] = math.fsum(each) / len(each)
        average = math.fsum(values[f"eval/{family}_pass_at_{k}"] for family in families) / len(families)
        values[f"eval/average_pass_at_{k}"] = average
    values["eval/tokens_per_rollout_mean"] = sum(row["tokens"] for row in rows) / sum(row["n"] for row in rows)
    return _points(values, int(rows[0]["cost"][currency]))


def result_points(cell: Cell) -> list[Point]:
    """Totals of a finished run: measured currencies, fates, time by phase; empty before it has finished."""
    result = read_json(cell.folder / "result.json")
    if result is None:
        return []
    spent = result["spent"]
    values = {f"time/{phase}_seconds": value for phase, value in result.get("seconds", {}).items()}
    values |= {f"drawn/{fate}_rollouts": value for fate, value in result.get("drawn", {}).items()}
    values |= {f"cost/{name}": spent[name] for name in ("device_seconds", "verifier_seconds") if name in spent}
    values |= {"time/wall_seconds": result.get("wall_seconds"), "cost/overshoot": result.get("overshoot")}
    values["cost/evaluation_tokens"] = result.get("evaluation_tokens")
    values["cost/oracle_tokens"] = result.get("oracle", {}).get("tokens_generated")
    return _points(values, int(spent[cell.currency]))


def fresh(points: Iterable[Point], last: Mapping[str, int]) -> list[Point]:
    """The points whose step lies beyond the `last` one that the store has of their key, one a step."""
    first: dict[tuple[str, int], Point] = {}
    for point in points:
        if point.step > last.get(point.key, -1):
            first.setdefault((point.key, point.step), point)
    return list(first.values())


def _points(values: Mapping[str, Any], step: int) -> list[Point]:
    """Finite numbers only: a store makes infinity a number; the record keeps what is left out here."""
    return [
        Point(_clean(key), float(value), step)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _clean(key: str) -> str:
    return _NOT_IN_KEYS.sub("_", key)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)
