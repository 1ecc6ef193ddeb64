"""Opening results folders of other people: nothing in them may lead out of them, and their names are only text."""

from __future__ import annotations

import os
import stat
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from benchmark.errors import InputError

_REMEDY = "Ask where the folder comes from; to keep results on another disk, link the whole results folder"


def check_folder(folder: Path, *, links: bool = True) -> None:
    """Refuse a results folder that leads out of itself.

    Args:
        links: whether links to what lies inside the folder are allowed.

    Raises:
        InputError: there is a link to somewhere else, a link at all without `links`, or something that is neither a
            file nor a folder (reading a pipe would wait for ever).
    """
    root = folder.resolve()
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:  # replaced meanwhile, by a run at work
                continue
            if stat.S_ISLNK(kind):
                if not (links and _resolved(path).is_relative_to(root)):
                    raise InputError(f"is a link to {os.readlink(path)}", file=path, remedy=_REMEDY)  # noqa: PTH115
            elif not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise InputError("is neither a file nor a folder", file=path, remedy="Remove it")


def check_out(folder: Path) -> None:
    """Refuse a folder for results that cannot be one.

    Raises:
        InputError: a file stands there, or on the way.
    """
    stands = next(path for path in (folder, *folder.parents) if path.exists())
    if not stands.is_dir():
        where = "stands where the folder of results should be"
        raise InputError(f"a file {where}", file=stands, key="--out", remedy="Choose another folder with --out")


def inside(folder: Path, name: object) -> Path:
    """The path of `name`, as a record in `folder` states it, if that lies in the folder.

    Raises:
        InputError: it is no text, or leads out of the folder.
    """
    if isinstance(name, str) and "\0" not in name and name not in ("", "."):
        path = folder / name
        if not Path(name).is_absolute() and ".." not in Path(name).parts:
            return path
    what = "does not lie in the results folder"
    raise InputError(what, file=folder / "plan.json", key="dir", value=name, remedy="Do not trust this folder")


def check_plan(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """`plan` if its cells can be looked up: each has a text `arm`, a whole number `seed`, and a `dir` in `folder`.

    Raises:
        InputError: one has not.
    """
    cells = plan.get("cells", [])
    file, remedy = folder / "plan.json", "Run the study: it writes its plan anew"
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise InputError("is not a list of cells", file=file, key="cells", remedy=remedy)
    for place, cell in enumerate(cells):
        for key, kind in (("arm", str), ("seed", int)):
            if not isinstance(cell.get(key), kind) or isinstance(cell.get(key), bool):
                what = f"is not {'text' if kind is str else 'a whole number'}"
                raise InputError(what, file=file, key=f"cells.{place}.{key}", value=cell.get(key), remedy=remedy)
        inside(folder, cell.get("dir"))
    for key in ("study", "primary_metric", "primary_currency"):
        if not isinstance(plan.get(key, ""), str):
            raise InputError("is not text", file=file, key=key, value=plan[key], remedy=remedy)
    return plan


def stored_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file that the suite has stored: no tags of objects, no aliases.

    Raises:
        InputError: the file holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # A few aliases can stand for gigabytes; the suite writes none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise yaml.YAMLError("aliases")
        value = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = type(error).__name__
        raise InputError(f"not a stored configuration ({reason})", file=path, remedy="Restore it") from None
    if not isinstance(value, dict):
        raise InputError("not a stored configuration", file=path, remedy="Restore it")
    return value


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control and formatting characters become ``?``."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "?" for c in text)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # broken, or a loop
        return Path(path.anchor)
