"""The code that is running: its commit, whether the checkout was changed, a hash of its files and of a method's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import benchmark

PACKAGES = ("benchmark", "baselines", "methods", "analysis")
SUFFIXES = (".py", ".yaml", ".html", ".css", ".js")
_GIT_SECONDS = 20.0


def code_of(method: type) -> dict[str, Any]:
    """`code_state`, and ``method_sha256`` of the files behind a method's class.

    They are its own module, those of the classes it is derived from, and what these take from their own packages; the
    harness is not among them.
    """
    known, waiting = dict[str, Path](), [cls.__module__ for cls in method.__mro__]
    tops = {name.partition(".")[0] for name in waiting} - sys.stdlib_module_names - {"benchmark"}
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        if module is None or path is None or name in known or name.partition(".")[0] not in tops:
            continue
        known[name] = Path(path)
        waiting += [
            value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))
            for value in list(vars(module).values())
        ]
    total = hashlib.sha256()
    for name in sorted(known):
        total.update(f"{name}\0{known[name].stat().st_size}\0".encode() + known[name].read_bytes())
    return {**code_state(), "method_sha256": total.hexdigest()}


def method_changed(result: Mapping[str, Any], method: type) -> bool:
    """Whether a run ended with other files of its method than those of now; False where its result does not say."""
    now = code_of(method)["method_sha256"]
    last = (result.get("code") or [{}])[-1]
    return bool(last.get("method_sha256", now) != now)


@cache
def code_state() -> dict[str, Any]:
    """What a result says of the code that made it.

    Returns:
        ``source_sha256`` of the packages' files; ``commit`` and ``dirty`` (a file of the packages is changed or new)
        of the checkout; where there is none, ``commit`` is None and ``git`` says why.
    """
    root = Path(benchmark.__path__[0]).resolve().parent
    return {"source_sha256": _source_hash(root), **_git_state(root)}


def _source_hash(root: Path) -> str:
    files = [path for name in PACKAGES for path in (root / name).rglob("*") if path.suffix in SUFFIXES]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def _git_state(root: Path) -> dict[str, Any]:
    try:
        # Installed packages may lie in a folder of somebody else's checkout, whose commit says nothing of them.
        top = _git(root, ["rev-parse", "--show-toplevel"])
        if Path(top).resolve() != root:
            return {"commit": None, "dirty": None, "git": "the packages are not in a checkout of their own"}
        changed = _git(root, ["status", "--porcelain", "--", *PACKAGES])
        return {"commit": _git(root, ["rev-parse", "HEAD"]), "dirty": bool(changed)}
    except FileNotFoundError:
        return {"commit": None, "dirty": None, "git": "git is not installed"}
    except subprocess.TimeoutExpired:
        return {"commit": None, "dirty": None, "git": "git did not answer"}
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or ["git failed"])[0].removeprefix("fatal: ")
        return {"commit": None, "dirty": None, "git": why.replace(str(root), ".")}


def _git(root: Path, arguments: Sequence[str]) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS)
    return done.stdout.strip()
