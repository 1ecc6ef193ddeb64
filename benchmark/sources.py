"""Where the files of a task are: here, in the folder ``ROLLOUTBENCH_DATA``, or made from a data set of the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.config import HubConfig, digest
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_text

DATA = "ROLLOUTBENCH_DATA"


def local_file(name: str) -> Path:
    """`name` here or, where it is not, in the folder of local data; it may exist in neither."""
    inside = Path(os.environ.get(DATA, "")) / name
    return inside if DATA in os.environ and not Path(name).is_file() else Path(name)


def data_file(name: str, hub: Mapping[str, HubConfig]) -> Path:
    """The local file, or one made from the data set of `hub` that stands in for it and kept in the cache.

    Raises:
        InputError: the data set cannot be reached or has no such columns.
    """
    path = local_file(name)
    if path.is_file() or name not in hub:
        return path
    from benchmark.warmup import cache_folder  # imports torch

    source = hub[name]
    made = cache_folder().parent / "data" / f"{path.stem}-{digest(source)[:12]}.jsonl"
    if not made.is_file():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _download(source, name)]
        made.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(made, "".join(lines))
    return made


def _download(source: HubConfig, name: str) -> list[dict[str, str]]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(source.id, source.config, split=source.split)
    except (OSError, ValueError) as error:  # what datasets and the hub raise of it
        remedy = f"Put the file here, or into a folder that {DATA} names, or go where the hub can be reached"
        what = f"is not here, and {source.id} cannot be read ({type(error).__name__}: {error})"
        raise InputError(what, file=Path(name), remedy=remedy) from error
    for column in (source.problem, source.answer):
        if column not in rows.column_names:
            remedy = f"Choose of {', '.join(rows.column_names)}"
            raise InputError(f"{source.id} has no such column", key=f"task.hub.{name}", value=column, remedy=remedy)
    stem = Path(name).stem
    return [
        {"id": f"{stem}/{number}", "problem": str(row[source.problem]), "answer": _text(row[source.answer])}
        for number, row in enumerate(rows)
    ]


def _text(answer: Any) -> str:
    return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
