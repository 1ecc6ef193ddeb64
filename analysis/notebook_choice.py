"""Which notebooks a results folder has something for, and whether they know the parameters that were asked for."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmark.cells import read_json
from benchmark.errors import InputError
from benchmark.registry import suggest

NOTEBOOKS = Path(__file__).parent / "notebooks"
SOURCES = ("files", "mlflow")
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
ELSEWHERE = {"results": "DIR", "out": "--out", "source": "--source", "tracking_uri": "--tracking-uri"}
"""Parameters of every notebook, and what else of the command gives them."""


def locate(path: str) -> Path:
    """A path relative to the working directory, or to the nearest folder above that has it (notebooks move)."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / path).exists():
            return folder / path
    return Path(path)


def holds(folder: Path, name: str) -> bool:
    """Whether `folder` itself holds what the notebook `name` reads."""
    if name == "sweep":
        from analysis.figures_sweep import has_trials  # pandas

        return has_trials(folder)
    return (folder / ("tables/variance.csv" if name == "gradient_variance" else "plan.json")).is_file()


def fitting(folder: Path) -> list[str]:
    """The notebooks for what `folder` itself holds; none where it is the folder of several studies."""
    found = [name for name in RESULTS if holds(folder, name)]
    if "sweep" in found:  # its plan, of trials, is not that of a study
        return ["sweep"]
    if "ablation" in found and (read_json(folder / "plan.json") or {}).get("study") != "ablation":
        found.remove("ablation")
    return found


def folder_of(name: str, results: Path, source: str) -> Path:
    """What the notebook `name` reads: `results`, or its default study below a folder of several."""
    if source == "mlflow":
        # The default folder is no experiment's name.
        return results / RESULTS[name] if results == Path("results") else results
    below = results / RESULTS[name]
    return below if below.is_dir() and not holds(results, name) else results


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters of a notebook, which its first cell of code sets, with their defaults."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    first = next(cell for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    lines = ast.parse("".join(first["source"])).body
    set_there = [(line.targets[0], line.value) for line in lines if isinstance(line, ast.Assign)]
    return {to.id: ast.literal_eval(value) for to, value in set_there if isinstance(to, ast.Name)}


def check_options(names: Iterable[str], options: Mapping[str, str]) -> None:
    """Refuse a parameter that none of the notebooks has.

    Raises:
        InputError: there is one.
    """
    known = sorted({key for name in names for key in parameters_of(name)} - ELSEWHERE.keys())
    for key, value in options.items():
        if key not in known:
            remedy = f"Give it with {ELSEWHERE[key]}" if key in ELSEWHERE else suggest(key, known)
            raise InputError("no such parameter of the notebook", key=f"--set {key}", value=value, remedy=remedy)


def check_results(name: str, folder: Path, parameters: Mapping[str, Any]) -> None:
    """Refuse, before a kernel starts, results that the notebook `name` cannot show.

    Raises:
        InputError: there are none in `folder`, or one of the arms to show is not in them.
    """
    if not holds(folder, name):
        place = RESULTS[name]
        remedy = f"`{MADE_BY[place]}` makes results/{place}; or name the folder of other ones"
        raise InputError(f"no results for the notebook {name}", file=folder, remedy=remedy)
    own = parameters_of(name)
    for key in [key for key in ("arm", "reference") if key in own]:
        arm = parameters.get(key, own[key])
        arms = (read_json(folder / "plan.json") or {}).get("arms", [])
        if arm not in arms:
            remedy = suggest(arm, arms) if key in parameters else f"Choose one with --set {key}={'|'.join(arms)}"
            raise InputError("not an arm of this study", file=folder, key=key, value=arm, remedy=remedy)
