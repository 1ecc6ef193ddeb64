"""What the shell completes: names of files in ``configs/``, notebooks, arms and metrics. Imports nothing heavy."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from benchmark.installing import config_folder

GROUP = "rolloutbench.methods"
METRICS = ("pass_at_1", "pass_at_8", "pass_at_32")


def complete_method(incomplete: str) -> list[str]:
    """Arms whose name begins so; read from the entry points, for loading arms takes seconds."""
    return sorted(entry.name for entry in entry_points(group=GROUP) if entry.name.startswith(incomplete))


def complete_config(kind: str) -> Callable[[str], list[str]]:
    """A completion by the names in ``configs/<kind>``, and by the folders and YAML files that a path begins."""

    def complete(incomplete: str) -> list[str]:
        names = sorted(path.stem for path in (config_folder() / kind).glob("*.yaml"))
        # Not Path.glob, which would drop a leading ./ that was typed.
        found = sorted(glob.glob(f"{glob.escape(incomplete)}*")) if incomplete else []  # noqa: PTH207
        paths = [f"{path}/" if Path(path).is_dir() else path for path in found]
        paths = [path for path in paths if path.endswith(("/", ".yaml", ".yml"))]
        return [name for name in names if name.startswith(incomplete)] + paths

    return complete


def complete_notebook(incomplete: str) -> list[str]:
    """Notebooks whose name begins so."""
    spec = find_spec("analysis")
    places = (spec.submodule_search_locations or []) if spec else []
    names = sorted(path.stem for place in places for path in Path(place, "notebooks").glob("*.ipynb"))
    return [name for name in names if name.startswith(incomplete)]


def complete_arm(ctx: typer.Context, incomplete: str) -> list[str]:
    """Arms of the study that the command is about; all arms where it has no results."""
    arms = _plan(ctx).get("arms")
    if not isinstance(arms, list):
        return complete_method(incomplete)
    return [arm for arm in arms if isinstance(arm, str) and arm.startswith(incomplete)]


def complete_metric(ctx: typer.Context, incomplete: str) -> list[str]:
    """The usual metrics, and the one that the study of the command is about."""
    known = dict.fromkeys([*METRICS, str(_plan(ctx).get("primary_metric", METRICS[0]))])
    return [metric for metric in known if metric.startswith(incomplete)]


def _plan(ctx: typer.Context) -> dict[str, Any]:
    folder = ctx.params.get("results") or "results/main_table"
    try:
        plan = json.loads(Path(folder, "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}
