"""Verification of a results folder: nothing changed since it was written, the accounts add up, the report follows.

Read-only; what is said of a folder made by an older version, which recorded less, is named as lacking.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from analysis.audit_run import RunFindings, check_run
from analysis.formatting import counted
from analysis.provenance import made_by
from analysis.rebuild import WITHOUT_PLAN, rebuild
from analysis.results import read_json
from benchmark.errors import InputError
from benchmark.jsonl import PARTIAL
from benchmark.opening import check_folder, check_plan
from benchmark.seal import CONFIG, LEASES, MANIFEST, PLAN, RESULT, Contents, contents, file_hash, is_sealed

REPORT = "REPORT.md"
OF_A_RUN: tuple[str, ...] = (CONFIG, RESULT, LEASES, "checkpoint", "policy", "progress.json", "failure.json", "run.log")
OF_A_RUN += ("ledger.jsonl", "timings.jsonl", "metrics.jsonl", "evaluation.jsonl", "allocation.jsonl", "traces.jsonl")
"""What a run writes into its folder; a study's own folder has none of it."""


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        wrong: what does not agree, each with the file it is about.
        lacks: what the folder does not record, so that it could not be checked.
        checked: what was checked, with counts.
    """

    wrong: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)


def audit(folder: Path) -> Audit:
    """Verify a study, a sweep or a single run: seals, manifest, ledgers, hashes, and the report made again.

    Raises:
        InputError: there are no results, or the folder leads out of itself (`benchmark.opening.check_folder`).
    """
    if not folder.is_dir():
        raise InputError("no such folder", file=folder, remedy="Give the results folder of a study, a sweep or a run")
    check_folder(folder, links=False)
    found = contents(folder)
    old = sorted(_old_runs(folder, found))
    if not found.runs and not old and not (folder / MANIFEST).exists():
        remedy = "Give the results folder of a study, a sweep or a run"
        raise InputError("no finished run there", file=folder, remedy=remedy)
    done = Audit()
    _check_files(folder, found, done)
    sound = [run for run in found.runs if is_sealed((folder / run / RESULT).read_bytes())]
    runs = {run: check_run(folder / run) for run in (*sound, *old)}
    for run, of in runs.items():
        done.wrong += [f"{_place(run, name)}: {what}" for name, what in of.wrong]
        done.lacks += [f"{run or folder}: {what}" for what in of.lacks]
    done.checked.append(f"{counted(len(runs), 'run')}: {counted(sum(r.rows for r in runs.values()), 'ledger row')}")
    done.checked += sorted({line for of in runs.values() for line in of.code})
    _compare_runs(runs, done)
    for part in ("", *found.parts):
        _check_study(folder / part, part, done)
    return done


def _old_runs(folder: Path, found: Contents) -> Iterator[str]:
    """Folders of ended runs whose result has no seal."""
    for name in found.loose:
        place, _, base = name.rpartition("/")
        beside = folder / place
        if base == RESULT and (beside / CONFIG).exists() and not (beside / PLAN).exists():
            yield place


def _place(run: str, name: str) -> str:
    return f"{run}/{name}" if run else name


# -- bytes ---------------------------------------------------------------------------------------------------------


def _check_files(folder: Path, found: Contents, done: Audit) -> None:
    """Every file against the hash that vouches for it."""
    done.wrong += [f"{name}: is not empty" for name in found.locks if (folder / name).stat().st_size]
    listed = {_place(run, name): sha for run, of in found.runs.items() for name, sha in of.items()}
    vouched, known = dict(listed), set[str]()
    for part in ("", *found.parts):
        manifest = _manifest(folder / part / MANIFEST)
        if manifest is None:
            if (folder / part / MANIFEST).exists():
                done.wrong.append(f"{_place(part, MANIFEST)}: is not a manifest")
            continue
        vouched |= {_place(part, name): str(sha) for name, sha in manifest["files"].items()}
        known.add(part)
        gone = [inner for inner in manifest["parts"] if _place(part, str(inner)) not in found.parts]
        done.wrong += [f"{_place(part, str(inner))}/{MANIFEST}: is missing" for inner in gone]
    for name in found.sealed:
        if is_sealed((folder / name).read_bytes()) or (name in vouched and Path(name).name != RESULT):
            continue
        if known or found.runs:
            done.wrong.append(f"{name}: its content does not have the hash that it states")
    broken = [run for run in found.runs if not is_sealed((folder / run / RESULT).read_bytes())]
    for name, sha in sorted(vouched.items()):
        path = folder / name
        if not _clean(name) or not path.is_file():
            done.wrong.append(f"{name}: is missing")
        elif file_hash(path) != sha:
            done.wrong.append(f"{name}: its bytes changed since its hash was taken")
    strays = [_place(part, name) for part in ("", *found.parts) for name in _strays(folder / part)]
    done.wrong += [f"{name}: is of a run, and a study's runs lie in cells/; move it away" for name in strays]
    for name in found.loose + [n for part in found.parts for n in _loose(folder, part)]:
        if any(name == stray or name.startswith(f"{stray}/") for stray in strays):
            continue
        if name in vouched or any(name.startswith(_place(run, "")) for run in broken):
            continue
        _unvouched(name, found, known, done)
    done.checked.append(f"{counted(len(vouched) + len(found.sealed), 'file')} by hash")
    if found.unfinished:
        done.lacks.append(f"{counted(len(found.unfinished), 'run')} not finished: {', '.join(found.unfinished)}")


def _strays(folder: Path) -> list[str]:
    """What a run left in the folder of a study itself."""
    return [name for name in OF_A_RUN if (folder / name).exists()] if (folder / PLAN).exists() else []


def _loose(folder: Path, part: str) -> list[str]:
    return [f"{part}/{name}" for name in contents(folder / part).loose]


def _unvouched(name: str, found: Contents, known: set[str], done: Audit) -> None:
    """A file that no hash vouches for: wrong where all files have one."""
    if name.endswith(PARTIAL):
        done.wrong.append(f"{name}: was left half written by a process that died; remove it")
    elif known:
        done.wrong.append(f"{name}: came after the manifest; move it away, or `rolloutbench report` lists it")
    elif found.runs and name == REPORT:
        done.wrong.append(f"{MANIFEST}: is missing though there is a report; `rolloutbench report` writes it")
    elif "" in found.runs:
        done.wrong.append(f"{name}: is not listed in {RESULT}")
    elif name == REPORT or not found.runs:
        lack = "no hashes of files (made before there were any)"
        done.lacks += [] if lack in done.lacks else [lack]


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    sound = isinstance(value, dict) and isinstance(value.get("files"), dict) and isinstance(value.get("parts"), list)
    return value if sound else None


def _clean(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


# -- records -------------------------------------------------------------------------------------------------------


def _compare_runs(runs: dict[str, RunFindings], done: Audit) -> None:
    """Runs of one task and task seed saw the same problems."""
    seen: dict[str, tuple[str, str]] = {}
    for run, of in runs.items():
        for task, data in of.data.items():
            other, known = seen.setdefault(task, (run, data))
            if known != data:
                done.wrong.append(f"{_place(run, RESULT)}: its problems are not those of {other}, of the same task")


def _check_study(folder: Path, part: str, done: Audit) -> None:
    """The plan of a study or sweep, and its report made again; the report alone where there is no plan."""
    if not (folder / PLAN).exists():
        if any((folder / settings).exists() for settings in WITHOUT_PLAN):
            try:
                _check_report(folder, part, done)
            except InputError as error:
                done.wrong.append(str(error))
        return
    try:
        plan = read_json(folder / PLAN) or {}
        check_plan(folder, plan)
        for cell in plan["cells"]:
            result = read_json(folder / cell["dir"] / RESULT)
            if result is not None and cell.get("run_hash") != result.get("run_hash"):
                done.wrong.append(f"{_place(part, cell['dir'])}/{RESULT}: is of another run than the plan names")
        if (folder / REPORT).exists():
            _check_report(folder, part, done)
        else:
            done.lacks.append(f"{part or folder}: no report yet")
    except InputError as error:
        done.wrong.append(str(error))


def _check_report(folder: Path, part: str, done: Audit) -> None:
    made = _manifest(folder / MANIFEST) or {}
    now = made_by()
    same = made.get("code", {}).get("source_sha256") == now["code"]["source_sha256"]
    same &= made.get("libraries") == now["libraries"]
    with TemporaryDirectory() as scratch:
        out = Path(scratch)
        rebuild(folder, out=out)
        again = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # Vector and pixel formats hold the same drawing; compressors differ between machines, text does not.
    texts = {name: data for name, data in again.items() if not name.endswith((".png", ".pdf"))}
    compared = texts if same else {name: data for name, data in texts.items() if name.endswith(".csv")}
    for name, data in sorted(compared.items()):
        path = folder / name
        if not path.is_file():
            done.wrong.append(f"{_place(part, name)}: is missing; `rolloutbench report` makes it")
        elif path.read_bytes() != data and (same or not _same_numbers(path.read_bytes(), data)):
            told = "is not what the records give"
            told += "" if same else " (by this code, which is not the code that wrote it)"
            done.wrong.append(f"{_place(part, name)}: {told}; `rolloutbench report` makes it anew")
    drawn = sum(name.endswith(".svg") for name in compared)
    tables = sum(name.endswith(".csv") for name in compared)
    done.checked.append(
        f"{part or folder.name}: {counted(tables, 'table')} and {counted(drawn, 'figure')} made again from the records"
    )
    if not same:
        done.lacks.append(
            f"{part or folder}: the report was written by other code or libraries, so only the numbers of its tables "
            "were made again"
        )


def _same_numbers(stored: bytes, again: bytes) -> bool:
    """Whether two CSV tables agree in the columns that both have."""
    try:
        old, new = (pd.read_csv(io.BytesIO(data), dtype=str) for data in (stored, again))
    except ValueError:
        return False
    shared = [column for column in new.columns if column in old.columns]
    return bool(shared) and old[shared].equals(new[shared])
