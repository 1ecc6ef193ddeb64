"""Hashes that make a changed byte in a results folder show: sealed JSON files, and manifests of all others.

* A sealed file holds the hash of its own content: ``result.json``, leases, the mirror's state, manifests.
* ``result.json`` of a run lists the hashes of the run's files as they were when it ended.
* ``manifest.json`` of a study lists the hashes of everything else that will not change any more. What is still to
  change (runs that have not ended) is named instead, and so are folders with a manifest of their own.

Whoever changes a file and makes all hashes anew is found only by a copy of the manifest's hash kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.jsonl import PARTIAL, atomic_write_json
from benchmark.schema import digest

MANIFEST, RESULT, CONFIG, LEASES, PLAN = "manifest.json", "result.json", "config.yaml", "lease", "plan.json"
MIRROR, MIRROR_LOCK = "mlflow_state.json", ".mlflow_state.lock"
KEY = "sha256"


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the hash of its canonical JSON as last key."""
    plain = {key: content for key, content in value.items() if key != KEY}
    return {**plain, KEY: digest(plain)}


def is_sealed(data: bytes) -> bool:
    """Whether `data` is a sealed object, byte for byte as it was written (indented, or in one line)."""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or KEY not in value or sealed(value) != value:
            return False
        written = (json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n", json.dumps(value))
        return data in [text.encode() for text in written]
    except (ValueError, RecursionError):
        return False


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_files(folder: Path) -> dict[str, str]:
    """Hashes of the files of a run that ends now, by path; leases and what workers print are not the run's."""
    return {
        name: file_hash(folder / name)
        for name in _files(folder)
        if name not in (RESULT, "run.log", "failure.json")
        and not name.startswith((f"{LEASES}/", "checkpoint/"))
        and not name.endswith(PARTIAL)
    }


@dataclass
class Contents:
    """What a results folder holds, by who vouches for it; paths are relative to the folder.

    Attributes:
        runs: folders of ended runs, and the files that their ``result.json`` lists with their hashes.
        unfinished: folders of runs that have not ended.
        parts: folders with a manifest of their own.
        sealed: files with the hash of their own content. locks: files that are always empty.
        loose: all others, for the manifest.
    """

    runs: dict[str, dict[str, str]] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    sealed: list[str] = field(default_factory=list)
    locks: list[str] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)


def contents(folder: Path) -> Contents:
    """Sort the files of a results folder, or of a single run."""
    found, files = Contents(), list(_files(folder))
    places = {name: name.rpartition("/")[0] for name in files}
    for name, place in places.items():
        base = name.rpartition("/")[2]
        if base == MANIFEST and place:
            found.parts.append(place)
        elif f"{place}/{PLAN}".lstrip("/") in places:
            continue  # a study is no run, whatever lies beside its plan
        elif base == RESULT and (listed := listed_files(folder / name)) is not None:
            found.runs[place] = listed
        elif base == CONFIG and f"{place}/{RESULT}".lstrip("/") not in places:
            found.unfinished.append(place)
    for name, place in places.items():
        if _below(name, found.parts) or _below(name, found.unfinished):
            continue
        base = name.rpartition("/")[2]
        if base in (MIRROR, MANIFEST) or (base == RESULT and place in found.runs):
            found.sealed.append(name)
        elif base == MIRROR_LOCK:
            found.locks.append(name)
        elif place.rpartition("/")[2] == LEASES:
            (found.sealed if base.isdecimal() else found.locks).append(name)
        elif not any(name.removeprefix(f"{run}/" if run else "") in of for run, of in _runs_of(name, found)):
            found.loose.append(name)
    return found


def listed_files(result: Path) -> dict[str, str] | None:
    """The files that a run's ``result.json`` vouches for; None where it is no sealed result of a run.

    One that should list files and does not, because it is damaged, vouches for none.
    """
    try:
        value = json.loads(result.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {} if result.with_name(CONFIG).exists() else None
    if not isinstance(value, dict) or not {KEY, "files"} & value.keys():
        return None
    listed = value.get("files")
    sound = isinstance(listed, dict) and all(isinstance(sha, str) for sha in listed.values())
    return listed if sound else {}


def write_manifest(folder: Path, about: Mapping[str, Any]) -> Path:
    """Write ``manifest.json`` of a results folder whose report has just been written.

    Args:
        about: what else it is to hold, for instance the code that wrote the report.
    """
    found = contents(folder)
    files = {name: file_hash(folder / name) for name in found.loose if not name.endswith(PARTIAL)}
    for name in found.sealed:
        # Versions that knew no seals left leases and states of the mirror without one.
        if Path(name).name == RESULT or (name != MANIFEST and not is_sealed((folder / name).read_bytes())):
            files[name] = file_hash(folder / name)
    value = {**about, "unfinished": found.unfinished, "parts": found.parts, "files": files}
    atomic_write_json(folder / MANIFEST, sealed(value))
    return folder / MANIFEST


def _files(folder: Path) -> Iterator[str]:
    """Paths of all files below `folder`, sorted; links are not followed."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield Path(place, name).relative_to(folder).as_posix()


def _below(name: str, folders: list[str]) -> bool:
    return any(not folder or name.startswith(f"{folder}/") for folder in folders)


def _runs_of(name: str, found: Contents) -> Iterator[tuple[str, dict[str, str]]]:
    """The run that a file belongs to, if it belongs to one."""
    place = name
    while place:
        place = place.rpartition("/")[0]
        if place in found.runs:
            yield place, found.runs[place]
