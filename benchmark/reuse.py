"""Finished runs of other studies that are runs of this one as well: same configuration, hence the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmark import registry
from benchmark.cells import Cell, claim
from benchmark.errors import InputError, storing
from benchmark.jsonl import atomic_write_json
from benchmark.opening import check_folder
from benchmark.seal import LEASES, RESULT, file_hash, is_sealed, listed_files
from benchmark.source import method_changed

ORIGIN = "origin.json"
_OWN = {LEASES, "checkpoint", "failure.json", RESULT}


def take_over(cells: Sequence[Cell], studies: Sequence[Path]) -> list[Cell]:
    """Copy into `cells` what is finished in other `studies`; the first that has a run gives it.

    A run's identity leaves the study's name out, so what is copied is what training would have written, measured
    seconds apart. A run made by other files of its method is left where it is. ``origin.json`` in the copy names the
    folder it came from.

    Returns:
        The cells that were filled.

    Raises:
        InputError: a folder of `studies` has no cells or leads out of itself, or a file is not what its run wrote.
        StorageError: a copy cannot be written.
    """
    check_studies(studies)
    for study in studies:
        check_folder(study)
    return [cell for cell in cells if any(_copy(study / "cells" / cell.folder.name, cell) for study in studies)]


def check_studies(studies: Sequence[Path]) -> None:
    """Refuse folders from which no runs can be taken over.

    Raises:
        InputError: one has no cells.
    """
    for study in studies:
        if not (study / "cells").is_dir():
            remedy = "Give the results folder of a study"
            raise InputError("no runs of a study there", key="--reuse", value=str(study), remedy=remedy)


def _copy(source: Path, cell: Cell) -> bool:
    if source.resolve() == cell.folder.resolve() or cell.result() is not None:
        return False
    result = Cell(cell.config, source).result()
    if result is None or method_changed(result, registry.load(cell.config.method.name)):
        return False
    _check(source)
    lease = claim(cell.folder)
    if lease is None:
        return False
    with lease, storing(cell.folder):
        for part in source.iterdir():
            if part.name not in _OWN:
                _replace(part, cell.folder / part.name)
        if not (source / ORIGIN).exists():
            atomic_write_json(cell.folder / ORIGIN, {"folder": str(source)})
        # Written last, as in a run: until then the cell counts as missing.
        shutil.copyfile(source / RESULT, cell.folder / f".{RESULT}")
        (cell.folder / f".{RESULT}").replace(cell.folder / RESULT)
    return True


def _check(source: Path) -> None:
    """Refuse a run whose files have not the hashes that it recorded; versions that recorded none are believed."""
    listed = listed_files(source / RESULT)
    if listed is None:
        return
    changed = [] if is_sealed((source / RESULT).read_bytes()) else [RESULT]
    changed += [n for n, sha in listed.items() if not (source / n).is_file() or file_hash(source / n) != sha]
    if changed:
        remedy = f"`rolloutbench audit {source.parent.parent}` says more; leave it out of --reuse"
        raise InputError("is not as the run left it", file=source / changed[0], remedy=remedy)


def _replace(part: Path, target: Path) -> None:
    if part.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(part, target)
    else:
        shutil.copyfile(part, target)
