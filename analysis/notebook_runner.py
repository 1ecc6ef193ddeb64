"""Executing the notebooks with papermill, on whatever results there are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.errors import InputError
from benchmark.installing import install_line

NOTEBOOKS = Path(__file__).parent / "notebooks"
RESULTS = {
    "main_results": "main_table",
    "ablation": "ablation",
    "gradient_variance": "variance",
    "sweep": "sweeps/modulation",
    "your_method": "main_table",
}
"""The notebooks, and the folder of ``results/`` that each reads by default: where the nox sessions put them."""
MADE_BY = {
    "main_table": "nox -s reproduce_main_table",
    "ablation": "nox -s ablation",
    "variance": "nox -s variance",
    "sweeps/modulation": "nox -s sweep",
}
"""The command that makes each folder."""


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
        InputError: papermill is missing, or a cell failed; the error names the notebook, and what the cell said.
    """
    try:
        import papermill
        from papermill.exceptions import PapermillExecutionError
        from traitlets.config import Config
    except ImportError as error:
        remedy = f"Run `{install_line('figures')}`, or `nox -s figures`"
        raise InputError(f"cannot be executed ({error})", key="notebook", value=name, remedy=remedy) from error
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
            )
        except PapermillExecutionError as error:
            what = f"a cell failed ({error.ename}: {error.evalue})"
            remedy = "Mend the cause; the copy holds the traceback"
            raise InputError(what, file=copy, remedy=remedy) from error
    return copy


def execute_all(results: Path, out: Path, parameters: Mapping[str, Any]) -> Iterator[Executed]:
    """Every notebook whose results are below `results`; with ``source="mlflow"`` every one that the store has."""
    for name, place in RESULTS.items():
        folder = results / place
        if parameters.get("source") == "mlflow":
            try:
                yield Executed(name, execute(name, folder, out, parameters))
            except InputError as error:
                yield Executed(name, reason=str(error))
        elif not folder.is_dir():
            yield Executed(name, reason=f"there is no {folder}; `{MADE_BY[place]}` makes it")
        else:
            yield Executed(name, execute(name, folder, out, parameters))


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
