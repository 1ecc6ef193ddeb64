"""What surrounds the numbers of a report: what is missing, what was run, whether accounts add up, how to repeat it."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from analysis.comparisons import Scores
from analysis.formatting import amount, counted, currency_name, exact
from analysis.results import Study
from benchmark.ledger import FATES
from benchmark.source import code_state

LIBRARIES = ("matplotlib", "numpy", "pandas", "seaborn")

_SHARED = {
    0: "so no difference is shown",
    1: "so the intervals of the difference are over problems only and do not hold the luck of training",
}


def facts(scores: Scores) -> dict[str, str]:
    """The size of a study in words, by what they are about."""
    study = scores.study
    budget = float(study.done["planned"].iloc[0])
    return {
        "runs": f"{len(study.done)} of {counted(len(study.cells), 'run')}",
        "arms": counted(len(study.arms), "arm"),
        "seeds": counted(len(study.plan["seeds"]), "seed"),
        "budget": f"{exact(budget)} {currency_name(str(study.done['planned_currency'].iloc[0]))} each",
        "scale": str(study.plan.get("scale", "?")),
        "problems": counted(len(scores.items), "problem"),
        "samples": counted(study.samples, "sample"),
    }


def caveats(scores: Scores) -> list[str]:
    """What a reader has to know before trusting the numbers, one sentence each."""
    study = scores.study
    problems = [*study.problems, *_retry(study)]
    absent = [arm for arm in study.plan["arms"] if arm not in study.arms]
    if study.reference in absent:
        problems.append(f"{study.reference}, the reference, has no finished run: nothing can be compared.")
    elif len(study.plan["seeds"]) > 1:
        shared = {arm: len(scores.seeds(arm, study.reference)) for arm in study.arms if arm != study.reference}
        for count, what in _SHARED.items():
            if lone := [arm for arm in shared if shared[arm] == count]:
                problems.append(f"{', '.join(lone)}: {counted(count, 'seed')} shared with {study.reference}, {what}.")
    states = study.done.groupby("arm")["method_sha256"].nunique()
    if mixed := [arm for arm in study.arms if states[arm] > 1]:
        problems.append(
            f"{', '.join(mixed)}: the files of the method changed between its runs, which are compared as one."
        )
    if study.plan.get("scale") == "smoke":
        problems.append("Scale smoke shows that everything runs; it is far too small to say anything about an arm.")
    return problems


def _retry(study: Study) -> list[str]:
    """Where the output of failed runs is, and the command that runs them again."""
    failed = study.cells[study.cells["state"] == "failed"]
    if failed.empty:
        return []
    again = study.plan.get("command") or "the command that made this study"
    logs = ", ".join(f"{cell}/run.log" for cell in failed["dir"])
    return [f"Output of what failed: {logs}. It is run again by: {again}"]


def audit(study: Study) -> list[str]:
    """Whether budgets were kept and every rollout is accounted for, one sentence each."""
    done, runs = study.done, counted(len(study.done), "run")
    exactly = int((done["overshoot"] == 0).sum())
    drawn = done[[f"drawn/{fate}" for fate in FATES]].sum(axis=1)
    whole = int((drawn == done["spent/rollouts"]).sum())
    lines = [
        f"{exactly} of {runs} ended exactly at the budget.",
        f"In {whole} of {runs} the fates of the rollouts ({', '.join(FATES)}) add up to the rollouts charged.",
    ]
    told = done[done["oracle/rollouts"] > 0]
    if len(told):
        arms = ", ".join(arm for arm in study.arms if arm in set(told["arm"]))
        lines.append(f"Told something for free, so no method but a bound: {arms}.")
    return lines


def reproduce(study: Study) -> str:
    """The command that makes the study again."""
    seeds: list[int] = study.plan["seeds"]
    options = f"--scale {study.plan.get('scale', 'small')}"
    if seeds == list(range(len(seeds))):  # other seeds can only come from the study's own file
        options += f" --seeds {len(seeds)}"
    whole = "nox -s reproduce_main_table --" if study.name == "main_table" else f"rolloutbench study {study.name}"
    return f"{whole} {options}"


def measured_on(study: Study) -> list[str]:
    """Devices, time and versions, one sentence each."""
    devices = sorted({str(device) for device in study.done["device"].dropna()})
    versions = [f"{library} {' and '.join(found)}" for library, found in study.versions.items()]
    seconds = float(study.done["wall_seconds"].fillna(0.0).sum())
    lines = [
        f"Device: {', '.join(devices) or 'not recorded'}; {amount(seconds / 60)} minutes of wall time, added up "
        "over the runs.",
        f"Versions: {', '.join(versions) or 'not recorded'}.",
    ]
    if any(len(found) > 1 for found in study.versions.values()):
        lines.append("The runs did not all use the same versions.")
    copied = study.done["origin"].astype(bool)
    if copied.any():
        studies = sorted({str(Path(folder).parent.parent) for folder in study.done["origin"][copied]})
        lines.append(
            f"{counted(int(copied.sum()), 'run')} of equal configuration taken over from {', '.join(studies)}, "
            "with the seconds measured there."
        )
    return lines


def made_by() -> dict[str, Any]:
    """The code and the libraries that write a report now; with the same ones the same records give the same bytes."""
    return {"code": code_state(), "libraries": {name: version(name) for name in LIBRARIES}}
