"""Experiments beside the arms: a question and its settings in a file, measured part by part, reported in tables.

An experiment tries an idea that is no method of training, so it has no arm, no budget and no claim. What it measures is
kept part by part (a seed, a policy, a closed form): a second start measures only what is missing, by the hash of all
settings that decide a part. Tables and REPORT.md are always made anew from the parts.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from analysis.formatting import amount, counted, currency_name, exact
from analysis.jobs import Job, Tell, perform
from analysis.provenance import made_by
from analysis.tables import Table
from benchmark.compose import find
from benchmark.config import Model, Name, digest
from benchmark.errors import InputError
from benchmark.jsonl import atomic_write_json, atomic_write_text
from benchmark.layers import Layer, did_you_mean, read_options, read_yaml, validate
from benchmark.progress import Display
from benchmark.seal import write_manifest

SETTINGS = "experiment.json"
VERSION = 1  # of what a part's file holds: raised when its numbers change
KINDS = {
    "all_action": "analysis.all_action:AllAction",
    "forgetting": "analysis.forgetting:Forgetting",
    "label_noise": "analysis.verifier_noise:LabelNoise",
    "low_rank": "analysis.low_rank:LowRank",
}
"""What can be measured, by the name that files give it."""


@dataclass(frozen=True)
class Measured:
    """What a part gives: rows for the tables, and what it drew, by currency."""

    rows: Sequence[Mapping[str, Any]]
    spent: Mapping[str, int] = field(default_factory=dict)


class Experiment(Model, ABC):
    """Settings of an experiment; a subclass says what they measure.

    Attributes:
        experiment: what is measured, a key of `KINDS`.
        question: what the result answers. source: the work that the idea is from.
        differs: what that work does and this does not.
    """

    experiment: Name
    question: str
    source: str
    differs: str = ""

    unit: ClassVar[str] = "parts"
    """Of the amounts that `parts` plans."""
    says_only: ClassVar[frozenset[str]] = frozenset({"question", "source", "differs"})
    """Settings that change no number of a part."""

    @abstractmethod
    def parts(self) -> Mapping[str, float]:
        """The parts, and how much each is planned to take in `unit`."""

    @abstractmethod
    def measure(self, part: str, tell: Tell) -> Measured:
        """Measure one part; `tell` takes how much of its planned amount is done."""

    @abstractmethod
    def tables(self, rows: pd.DataFrame) -> list[Table]:
        """The tables, from the rows of all parts; a row's ``part`` says which it is of."""

    @abstractmethod
    def findings(self, rows: pd.DataFrame) -> list[str]:
        """What the numbers say, a sentence or two each."""


def load(name: str, options: Sequence[str] = ()) -> Experiment:
    """The experiment of a file, or of a name in ``configs/experiments``, with ``KEY=VALUE`` options on top.

    Raises:
        InputError: there is no such file, or a key or value in it is wrong.
    """
    return _checked(read_options(options).over(read_yaml(find("experiments", name))))


def _checked(written: Layer) -> Experiment:
    kind = written.values.get("experiment")
    if kind not in KINDS:
        raise written.error("experiment", "nothing that can be measured", did_you_mean(str(kind), KINDS), kind)
    module, _, name = KINDS[str(kind)].partition(":")
    settings: type[Experiment] = getattr(import_module(module), name)
    return validate(settings, written)


def run_experiment(
    experiment: Experiment, out: Path, *, workers: int = 1, display: Callable[[], Display] = Display
) -> Path:
    """Measure what is missing and write ``REPORT.md``, ``tables/`` and ``parts/`` into `out`; returns the report.

    Raises:
        InputError: a name or value of the settings is wrong, or `out` holds something else.
    """
    held = _held(out)
    if held is not None and held.get("experiment") != experiment.experiment:
        raise InputError(f"holds the experiment {held.get('experiment')}", file=out, remedy="Choose another --out")
    planned = experiment.parts()
    missing = {part: size for part, size in planned.items() if not _file(experiment, out, part).exists()}
    jobs = [Job(part, size, _measure, (experiment, out, part)) for part, size in missing.items()]
    with display() as shown:
        shown.note(f"{experiment.experiment}: {counted(len(planned), 'part')}, {len(missing)} to measure, in {out}")
        perform(jobs, workers, shown, experiment.experiment, experiment.unit)
    atomic_write_json(out / SETTINGS, experiment.model_dump(mode="json"))
    report = _write(experiment, out, out)
    write_manifest(out, made_by())
    return report


def rebuild_experiment(folder: Path, out: Path | None = None) -> Path:
    """The report of an experiment's folder made again from its parts.

    Args:
        out: another folder for the report, which gets no manifest; `folder` then stays as it is.

    Raises:
        InputError: the settings are damaged, or a part is not measured, or by another version.
    """
    experiment = _checked(read_yaml(folder / SETTINGS))
    report = _write(experiment, folder, out or folder)
    if out is None:
        write_manifest(folder, made_by())
    return report


def _held(out: Path) -> dict[str, Any] | None:
    path = out / SETTINGS
    return read_yaml(path).values if path.exists() else None


def _file(experiment: Experiment, out: Path, part: str) -> Path:
    settings = experiment.model_dump(mode="json", exclude=set(experiment.says_only))
    return out / "parts" / f"{part}-{digest({'part': part, 'version': VERSION, **settings})[:8]}.json"


def _measure(experiment: Experiment, out: Path, part: str, tell: Tell) -> None:
    cpu = time.process_time()
    found = experiment.measure(part, tell)
    record = {"rows": [dict(row) for row in found.rows], "spent": dict(found.spent)}
    path = _file(experiment, out, part)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, record | {"cpu_seconds": time.process_time() - cpu})


def _write(experiment: Experiment, folder: Path, out: Path) -> Path:
    parts = {}
    for part in experiment.parts():
        path = _file(experiment, folder, part)
        if not path.exists():
            remedy = f"Measure it: `rolloutbench experiment {experiment.experiment}`"
            raise InputError("not measured, or by another version", file=path, remedy=remedy)
        parts[part] = json.loads(path.read_text(encoding="utf-8"))
    rows = pd.DataFrame([{"part": part, **row} for part, record in parts.items() for row in record["rows"]])
    tables = experiment.tables(rows)
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.write(out / "tables")
    sections = {
        "What is found": "".join(f"- {line}\n" for line in experiment.findings(rows)),
        "Tables": "".join(table.section() for table in tables),
        "What this is not": experiment.differs,
        "How to reproduce": _reproduce(experiment),
        "What it took": _took(parts),
    }
    body = "".join(f"## {title}\n\n{text.strip()}\n\n" for title, text in sections.items() if text.strip())
    path = out / "REPORT.md"
    head = f"# {experiment.question}\n\nExperiment `{experiment.experiment}`, an idea from {experiment.source}.\n\n"
    atomic_write_text(path, head + body.rstrip() + "\n")
    return path


def _reproduce(experiment: Experiment) -> str:
    """The command, with what differs from the shipped file."""
    shipped = load(experiment.experiment).model_dump(mode="json")
    changed = {key: value for key, value in experiment.model_dump(mode="json").items() if value != shipped[key]}
    options = "".join(f" --set {key}='{json.dumps(value)}'" for key, value in changed.items())
    return f"```\nrolloutbench experiment {experiment.experiment}{options}\n```"


def _took(parts: Mapping[str, Mapping[str, Any]]) -> str:
    seconds = sum(float(record["cpu_seconds"]) for record in parts.values())
    spent: dict[str, int] = {}
    for record in parts.values():
        for currency, value in record["spent"].items():
            spent[currency] = spent.get(currency, 0) + int(value)
    drawn = ", ".join(f"{exact(value)} {currency_name(currency)}" for currency, value in spent.items())
    return f"{counted(len(parts), 'part')}, {amount(seconds)} CPU seconds; drawn: {drawn or 'nothing'}."
