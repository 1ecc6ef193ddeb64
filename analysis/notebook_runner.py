"""Executing the notebooks with papermill, on whatever results there are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.notebook_choice import (
    MADE_BY,
    NOTEBOOKS,
    RESULTS,
    check_results,
    fitting,
    locate,
    parameters_of,
)
from benchmark.errors import InputError
from benchmark.installing import install_line


@dataclass(frozen=True)
class Executed:
    """A notebook and the copy with its outputs, or why there is none."""

    name: str
    copy: Path | None = None
    reason: str = ""


def execute(name: str, folder: Path, out: Path, parameters: Mapping[str, Any]) -> Path:
    """Execute one notebook; its copy with outputs is ``<out>/<name>.ipynb``, also where a cell fails.

    Args:
        name: of `RESULTS`. folder: the results it reads; for ``source="mlflow"`` its name is the experiment.
        out: where figures and the copy go. parameters: of its first cell, beside ``results`` and ``out``.

    Raises:
        InputError: papermill is missing, `folder` lacks what the notebook reads, or a cell failed; the error names the
            notebook, and what the cell said.
    """
    try:
        import papermill
        from papermill.exceptions import PapermillExecutionError
        from traitlets.config import Config

        from analysis.notebook_kernel import QuietKernelManager
    except ImportError as error:
        remedy = f"Run `{install_line('figures')}`, or `nox -s figures`"
        raise InputError(f"cannot be executed ({error})", key="notebook", value=name, remedy=remedy) from error
    if parameters.get("source") != "mlflow":
        check_results(name, locate(str(folder)), parameters)
    out.mkdir(parents=True, exist_ok=True)
    given = {**parameters, "results": str(folder), "out": str(out)}
    copy = out / f"{name}.ipynb"
    with _private_home() as home:
        # Sockets in a folder of this user's own: no open ports, and no other notebook's sockets.
        transport = Config({"ConnectionFileMixin": {"transport": "ipc", "ip": str(home / "socket")}})
        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                copy,
                given,
                progress_bar=False,
                kernel_name="python3",
                start_timeout=600,  # seconds; a busy machine takes its time to import
                cwd=str(Path.cwd()),
                config=transport,
                kernel_manager_class=QuietKernelManager,
            )
        except PapermillExecutionError as error:
            what = f"a cell failed ({error.ename}: {error.evalue})"
            remedy = "Mend the cause; the copy holds the traceback"
            raise InputError(what, file=copy, remedy=remedy) from error
    return copy


def execute_all(results: Path, out: Path, parameters: Mapping[str, Any]) -> Iterator[Executed]:
    """Every notebook that `results` or a folder below it is for; with ``source="mlflow"`` every one the store has."""
    mlflow = parameters.get("source") == "mlflow"
    alone = [] if mlflow else fitting(results)
    for name in alone or RESULTS:
        folder = results if alone else results / RESULTS[name]
        own = {key: value for key, value in parameters.items() if key in parameters_of(name)}
        if not mlflow and not folder.is_dir():
            yield Executed(name, reason=f"there is no {folder}; `{MADE_BY[RESULTS[name]]}` makes it")
            continue
        reason = _lack(name, folder, own) if alone else ""
        yield Executed(name, reason=reason) if reason else _executed(name, folder, out, own)


def _lack(name: str, folder: Path, parameters: Mapping[str, Any]) -> str:
    try:
        check_results(name, folder, parameters)
    except InputError as error:
        return str(error)
    return ""


def _executed(name: str, folder: Path, out: Path, parameters: Mapping[str, Any]) -> Executed:
    try:
        return Executed(name, execute(name, folder, out, parameters))
    except InputError as error:
        if parameters.get("source") != "mlflow":
            raise
        return Executed(name, reason=str(error))


@contextlib.contextmanager
def _private_home() -> Iterator[Path]:
    """Folders of Jupyter and IPython for this execution only: a home may be absent or read-only."""
    names = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="rb-") as folder:
        # Short, because the path of a socket may have about a hundred characters.
        os.environ |= {name: str(Path(folder, str(number))) for number, name in enumerate(names)}
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
