"""Reading a study's results folder into tidy frames, and saying what is missing in it.

Only cells that are done count; a cell that failed, is missing or holds an incomplete record is named in
`Study.problems` and left out, never filled in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmark.errors import InputError
from benchmark.jsonl import Row, read_rows
from benchmark.ledger import CURRENCIES, FATES, UNCHARGED_PHASES
from benchmark.opening import check_folder, check_plan, stored_config

MEASURED = ("device_seconds", "verifier_seconds")
_DEFAULT_KS = (1, 8, 32)


PLANNED = ("study", "primary_metric", "primary_currency", "families", "arms", "seeds", "reference", "cells")
"""Keys of ``plan.json`` that no report can do without."""


@dataclass(frozen=True)
class Study:
    """A study's plan and what its cells recorded.

    Attributes:
        folder: ``results/<study>``.
        plan: ``plan.json``.
        cells: one row per planned cell: arm, seed, dir, state (done, failed, running, interrupted, missing,
            incomplete), message; of done cells also planned, steps, overshoot, wall_seconds, device,
            spent/<currency>, oracle/<currency>, drawn/<fate>, seconds/<phase>, versions, method_sha256 (None where it
            was not kept), and as origin the folder a run was copied from, or "".
        points: one row per evaluation of a done cell: arm, seed, point, step, final, and the cumulative training
            spend in every currency.
        evaluations: one row per evaluated item: arm, seed, point, item, family, n samples, c correct.
        steps: one row per training step: arm, seed, step, currencies (cumulative), metric keys.
        allocation: one row per (arm, seed, step, n): how many prompts got n rollouts.
        problems: what a reader has to know before trusting the numbers, one sentence each.
    """

    folder: Path
    plan: dict[str, Any]
    cells: pd.DataFrame
    points: pd.DataFrame
    evaluations: pd.DataFrame
    steps: pd.DataFrame
    allocation: pd.DataFrame
    problems: tuple[str, ...]
    ks: tuple[int, ...] = _DEFAULT_KS

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.plan["study"])

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return str(self.plan.get("reference", "grpo"))

    @property
    def metric(self) -> str:
        """The primary metric, for instance ``pass_at_1``."""
        return str(self.plan.get("primary_metric", "pass_at_1"))

    @property
    def currency(self) -> str:
        """The currency that every arm spends the same amount of."""
        return str(self.plan.get("primary_currency", "tokens_generated"))

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The claims of the plan."""
        found = self.plan.get("claims") or []
        return [dict(claim) for claim in found]

    @cached_property
    def done(self) -> pd.DataFrame:
        """The rows of `cells` that are done."""
        return self.cells[self.cells["state"] == "done"]

    @cached_property
    def arms(self) -> list[str]:
        """Arms with at least one done cell, in the plan's order."""
        present = set(self.done["arm"])
        return [arm for arm in self.plan["arms"] if arm in present]

    @cached_property
    def families(self) -> list[str]:
        """Task families that were evaluated, in the plan's order."""
        present = set(self.evaluations["family"])
        planned = [family for family in self.plan.get("families", []) if family in present]
        return planned + sorted(present - set(planned))

    @cached_property
    def metrics(self) -> list[str]:
        """pass@k of every k that all final evaluations can estimate, the primary metric first."""
        names = dict.fromkeys([self.metric, *(f"pass_at_{k}" for k in self.ks)])
        return [name for name in names if k_of(name) <= self.samples]

    @cached_property
    def samples(self) -> int:
        """The smallest number of samples of an item in the final evaluations."""
        final = self.points.loc[self.points["final"], ["arm", "seed", "point"]]
        return int(self.evaluations.merge(final, on=["arm", "seed", "point"])["n"].min())

    @cached_property
    def versions(self) -> dict[str, list[str]]:
        """Versions of the libraries that done cells ran with, by library."""
        found: dict[str, set[str]] = {}
        for versions in self.done["versions"]:
            for library, version in json.loads(versions).items():
                found.setdefault(library, set()).add(str(version))
        return {library: sorted(versions) for library, versions in sorted(found.items())}


def only(study: Study, arms: Sequence[str], reference: str) -> Study:
    """The same study as if it had only some of its arms, and that one as the reference; claims are left out.

    Raises:
        InputError: an arm has no finished run.
    """
    for arm in arms:
        if arm not in study.arms:
            known = f"Arms with finished runs: {', '.join(study.arms)}"
            raise InputError("has no finished run", key="arm", value=arm, remedy=known)
    names = ("cells", "points", "evaluations", "steps", "allocation")
    frames = {name: getattr(study, name)[lambda frame: frame["arm"].isin(arms)] for name in names}
    return replace(study, plan={**study.plan, "arms": list(arms), "reference": reference, "claims": []}, **frames)


def k_of(metric: str) -> int:
    """The k of ``pass_at_<k>``.

    Raises:
        InputError: another name.
    """
    match = re.fullmatch(r"pass_at_([1-9][0-9]*)", metric)
    if match is None:
        raise InputError("no such metric", key="metric", value=metric, remedy="Metrics are pass_at_<k>")
    return int(match[1])


def load_study(folder: Path) -> Study:
    """Read a results folder.

    Raises:
        InputError: there is no plan, no cell is done, a record is damaged, or a metric needs more samples than
            were drawn.
    """
    plan = read_json(folder / "plan.json")
    if plan is None:
        raise InputError("no plan.json", file=folder, remedy="Name the results folder of a study")
    absent = [key for key in PLANNED if key not in plan]
    if absent:
        what = "is not the plan of a study"
        raise InputError(
            what, file=folder / "plan.json", key=absent[0], remedy="Run the study: it writes its plan anew"
        )
    check_folder(folder)
    check_plan(folder, plan)
    records = [_read_cell(folder, plan, planned) for planned in plan["cells"]]
    _require_same_items(records)
    done = [record for record in records if record.row["state"] == "done"]
    if not done:
        states = ", ".join(sorted({str(record.row["state"]) for record in records})) or "none planned"
        raise InputError(f"no cell is done ({states})", file=folder, remedy="Run the study first")
    study = Study(
        folder=folder,
        plan=plan,
        cells=pd.DataFrame([record.row for record in records]),
        points=pd.DataFrame([row for record in done for row in record.points]),
        evaluations=pd.concat([record.evaluations for record in done], ignore_index=True),
        steps=pd.DataFrame([row for record in done for row in record.steps]),
        allocation=pd.DataFrame(
            [row for record in done for row in record.allocation],
            columns=["arm", "seed", "step", "n", "prompts"],
        ),
        problems=tuple(_problems(plan, records)),
        ks=_ks(folder, done),
    )
    for metric in (study.metric, *(str(claim.get("metric", study.metric)) for claim in study.claims)):
        if k_of(metric) > study.samples:
            raise InputError(
                f"the final evaluation has only {study.samples} samples of an item",
                file=folder / "plan.json",
                key="metric",
                value=metric,
                remedy="Raise evaluation.final_samples, or ask for a smaller k",
            )
    return study


@dataclass
class _Record:
    """What one cell's folder holds; `row` goes to `Study.cells`."""

    row: dict[str, Any]
    points: list[dict[str, Any]] = field(default_factory=list)
    evaluations: pd.DataFrame = field(default_factory=pd.DataFrame)
    steps: list[dict[str, Any]] = field(default_factory=list)
    allocation: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.row['arm']} seed {self.row['seed']}"

    def refuse(self, why: str) -> None:
        self.row |= {"state": "incomplete", "message": why}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file.

    Raises:
        InputError: it holds something else.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", file=path, remedy="Restore it, or run the cell again")
    return value


def _read_cell(folder: Path, plan: Mapping[str, Any], planned: Mapping[str, Any]) -> _Record:
    try:
        return _read(folder, plan, planned)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"a record of the cell lacks what it should hold ({type(error).__name__}: {error})"
        remedy = "Restore it, or delete the cell and run it again"
        raise InputError(what, file=folder / str(planned["dir"]), remedy=remedy) from None


def _read(folder: Path, plan: Mapping[str, Any], planned: Mapping[str, Any]) -> _Record:
    cell = folder / str(planned["dir"])
    head: dict[str, Any] = {"arm": str(planned["arm"]), "seed": int(planned["seed"])}
    state, message = _state(cell, plan, planned)
    record = _Record({**head, "dir": str(planned["dir"]), "state": state, "message": message})
    result = read_json(cell / "result.json")
    if state != "done" or result is None:
        return record
    record.row |= _result_columns(result) | {"origin": (read_json(cell / "origin.json") or {}).get("folder", "")}
    rows = read_rows(cell / "evaluation.jsonl")[0]
    if not any(row.get("final") for row in rows):
        record.refuse("it has no final evaluation")
        return record
    seconds = _seconds_by_step(cell)
    record.points = [head | point for point in _points(rows, seconds)]
    keys = ("point", "item", "family", "n", "c")
    frame = pd.DataFrame({key: [row[key] for row in rows] for key in keys})
    record.evaluations = frame.assign(**head)
    if frame.duplicated(["point", "item"]).any():
        record.refuse("an item was evaluated twice at one point")
    costs = [point[str(plan.get("primary_currency", "tokens_generated"))] for point in record.points]
    if len(costs) > 1 and np.any(np.diff(costs) <= 0):
        record.refuse("its evaluation points are not in the order of their cost")
    metrics = read_rows(cell / "metrics.jsonl")[0]
    record.steps = [head | {"step": row["step"]} | row["cost"] | row["metrics"] for row in metrics]
    for row in read_rows(cell / "allocation.jsonl")[0]:
        for n, prompts in row["histogram"].items():
            record.allocation.append(head | {"step": row["step"], "n": int(n), "prompts": int(prompts)})
    return record


def _state(cell: Path, plan: Mapping[str, Any], planned: Mapping[str, Any]) -> tuple[str, str]:
    """State and reason of a cell, from the most to the least certain sign."""
    result = read_json(cell / "result.json")
    if result is not None:
        if "run_hash" in planned and result.get("run_hash") != planned["run_hash"]:
            return "incomplete", "its result belongs to another configuration"
        return "done", ""
    for failure in plan.get("failures", []):
        if (failure["arm"], failure["seed"]) == (planned["arm"], planned["seed"]):
            return "failed", str(failure.get("error", ""))
    failed = read_json(cell / "failure.json")
    if failed is not None:
        return "failed", str(failed.get("error", ""))
    progress = read_json(cell / "progress.json")
    if progress is None:
        return "missing", "it never ran"
    if progress.get("state") == "done":
        return "incomplete", "it has no result.json"
    return str(progress.get("state", "missing")), str(progress.get("message", ""))


def _result_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    currency, planned = next(iter(result["planned"].items()))
    columns: dict[str, Any] = {
        key: result.get(key) for key in ("steps", "overshoot", "wall_seconds", "evaluation_tokens", "device")
    }
    columns |= {"planned": planned, "planned_currency": currency}
    columns |= {f"spent/{name}": result["spent"].get(name, np.nan) for name in (*CURRENCIES, *MEASURED)}
    columns |= {f"oracle/{name}": result.get("oracle", {}).get(name, 0) for name in CURRENCIES}
    columns |= {f"drawn/{fate}": result.get("drawn", {}).get(fate, 0) for fate in FATES}
    columns |= {f"seconds/{phase}": value for phase, value in result.get("seconds", {}).items()}
    columns["method_sha256"] = (result.get("code") or [{}])[-1].get("method_sha256")
    return columns | {"versions": json.dumps(result.get("versions", {}), sort_keys=True)}


def _seconds_by_step(cell: Path) -> list[tuple[int, float, float]]:
    """(step, device seconds, verifier seconds) of every timing row, evaluation and oracles left out."""
    rows = []
    for row in read_rows(cell / "timings.jsonl")[0]:
        seconds = row.get("seconds", {})
        training = sum(value for phase, value in seconds.items() if phase not in UNCHARGED_PHASES)
        # A row with a point was taken after the point's evaluation: it belongs to what came before the next.
        begin = int(row["step"]) - (1 if "point" in row else 0)
        rows.append((begin, float(training), float(row.get("verifier_cpu", seconds.get("verify", 0.0)))))
    return rows


def _points(rows: list[Row], seconds: list[tuple[int, float, float]]) -> Iterator[dict[str, Any]]:
    """One row per evaluated point, with the seconds of the steps before it."""
    seen: set[int] = set()
    for row in rows:
        if row["point"] in seen:
            continue
        seen.add(row["point"])
        device = sum(training for step, training, _ in seconds if step < row["step"])
        verifier = sum(checking for step, _, checking in seconds if step < row["step"])
        measured = {"device_seconds": device, "verifier_seconds": verifier}
        yield ({"point": row["point"], "step": row["step"], "final": bool(row["final"])} | row["cost"] | measured)


def _require_same_items(records: list[_Record]) -> None:
    """Arms are compared item by item, so a cell that lacks items at a point cannot take part."""
    frames = {id(record): record.evaluations for record in records if record.row["state"] == "done"}
    everything = set().union(*(set(frame["item"]) for frame in frames.values()))
    for record in records:
        if id(record) not in frames:
            continue
        fewest = int(frames[id(record)].groupby("point")["item"].nunique().min())
        if fewest < len(everything):
            record.refuse(f"{fewest} of {len(everything)} items were evaluated")


def _problems(plan: Mapping[str, Any], records: list[_Record]) -> Iterator[str]:
    total = len(records)
    for state, words in _STATE_WORDS.items():
        cells = [record for record in records if record.row["state"] == state]
        reasons: dict[str, list[str]] = {}
        for record in cells:
            reasons.setdefault(str(record.row["message"]).rstrip(": "), []).append(record.name)
        if cells:
            named = "; ".join(f"{', '.join(names)}" + (f" ({why})" if why else "") for why, names in reasons.items())
            yield f"{len(cells)} of {total} cells {words}: {named}."
    done = [record for record in records if record.row["state"] == "done"]
    for record in done:
        row = record.row
        drawn = sum(int(row[f"drawn/{fate}"]) for fate in FATES)
        if drawn != row["spent/rollouts"]:
            charged = row["spent/rollouts"]
            yield f"{record.name} drew {drawn} rollouts by their fates but was charged for {charged}."
        if row["overshoot"]:
            yield f"{record.name} ended {row['overshoot']} away from its budget."
    for key, what in (("planned", "budgets"), ("planned_currency", "currencies of the budget")):
        values = sorted({str(record.row[key]) for record in done})
        if len(values) > 1:
            yield f"Cells have different {what}: {', '.join(values)}."
    if len(plan.get("seeds", [])) == 1:
        yield "There is one seed: no interval holds the luck of training, and every claim stays inconclusive."


_STATE_WORDS = {
    "failed": "failed",
    "missing": "are missing",
    "incomplete": "hold an incomplete record",
    "running": "are still running",
    "interrupted": "were interrupted",
}


def _ks(folder: Path, done: list[_Record]) -> tuple[int, ...]:
    """The k of the evaluation's configuration, which is the same in every cell."""
    path = folder / str(done[0].row["dir"]) / "config.yaml"
    if not path.exists():
        return _DEFAULT_KS
    section = stored_config(path).get("evaluation")
    found = section.get("k") if isinstance(section, dict) else None
    return tuple(int(k) for k in found) if isinstance(found, list) and found else _DEFAULT_KS
