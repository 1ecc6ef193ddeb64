"""Recorded success counts replayed: predictors, allocators, their tables, figures and REPORT.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.formatting import MISSING, counted, points
from analysis.replay_allocators import ARMS, Replayed, replay
from analysis.replay_log import CountLog, load_counts
from analysis.replay_predictors import Predictor, Rule, noise_floor, predictors
from analysis.tables import Column, Table, Text
from benchmark.jsonl import atomic_write_text

PREDICTORS = {
    "constant": "always 1/2",
    "pool": "all prompts, visit before",
    "last_visit": "last visit",
    "cumulative": "all visits",
    "cumulative_beta": "all visits, Beta(1, 1) prior",
    "default": "default of the suite",
    "fitted": "fitted prior and half-life",
    "fitted_pool": "fitted, prior follows the pool",
}
"""How tables and figures call a predictor."""

ALLOCATORS = {
    "grpo": "uniform (grpo)",
    "neyman_fitted": "Neyman, fitted prior and half-life",
    "hindsight": "Neyman, hindsight",
}


@dataclass(frozen=True)
class Findings:
    """What a log says.

    Attributes:
        rollouts: given out per prompt and visit. floor: Brier score of the true success rates.
        drift: (T,) success rate of all prompts by visit.
    """

    source: str
    prompts: int
    visits: int
    recorded: int
    rollouts: int
    floor: float
    drift: list[float]
    predictors: list[Predictor]
    allocators: list[Replayed]

    @property
    def fitted(self) -> Rule:
        """The prior and half-life of least score, on all prompts."""
        return next(row.rule for row in self.predictors if row.name == "fitted" and row.rule)

    def as_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        own = [_flat(row) for row in self.predictors]
        return {
            "log": {
                "file": self.source,
                "prompts": self.prompts,
                "visits": self.visits,
                "rollouts": self.recorded,
                "success_rate": self.drift,
            },
            "noise_floor": self.floor,
            "rollouts_per_prompt": self.rollouts,
            "fitted": {"prior": list(self.fitted.prior), "half_life": self.fitted.half_life},
            "predictors": own,
            "allocators": [asdict(row) for row in self.allocators],
        }


def _flat(row: Predictor) -> dict[str, Any]:
    values = asdict(row)
    rule = values.pop("rule")
    return values | ({"prior": list(rule["prior"]), "half_life": rule["half_life"]} if rule else {})


def replay_counts(
    path: Path,
    arms: Sequence[str] | None = None,
    rollouts: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Findings:
    """Read a log and replay every predictor and allocator on it.

    Args:
        arms: arms that allocate; those of `analysis.replay_allocators.ARMS` by default. rollouts: per prompt to give
            out, on average; as many as recorded by default. progress: called with the share that is done.

    Raises:
        InputError: see `load_counts` and `analysis.replay_allocators.replay`.
    """
    log = load_counts(path)
    each = rollouts or round(float(log.trials[log.seen].mean()))
    own = predictors(log, lambda share: progress(0.6 * share))
    fitted = next(row.rule for row in own if row.name == "fitted" and row.rule)
    found = replay(log, arms or ARMS, fitted, each, lambda share: progress(0.6 + 0.4 * share))
    return Findings(
        path.name,
        len(log.ids),
        int(log.seen.sum()),
        int(log.trials.sum()),
        each,
        noise_floor(log),
        _drift(log),
        own,
        found,
    )


def _drift(log: CountLog) -> list[float]:
    rates: list[float] = (log.correct.sum(0) / np.maximum(log.trials.sum(0), 1)).tolist()
    return rates


def predictor_table(found: Findings) -> Table:
    """A row a predictor: its rule, score, score above the floor, difference to the default, calibration."""
    rows = []
    best = min(row.brier for row in found.predictors)
    for row in found.predictors:
        apart = f"{1e3 * row.difference:+.2f} [{1e3 * row.difference_low:+.2f}, {1e3 * row.difference_high:+.2f}]"
        rows.append(
            [
                Text(PREDICTORS[row.name]),
                Text(_rule(row.rule)),
                Text(f"{row.brier:.4f} [{row.low:.4f}, {row.high:.4f}]", bold=row.brier == best),
                Text(f"{1e3 * (row.brier - found.floor):.1f}"),
                Text(MISSING if row.name == "default" else apart.replace("-", "\N{MINUS SIGN}")),
                Text(f"{row.calibration_error:.3f}"),
            ]
        )
    columns = [
        Column("history rule", left=True),
        Column("parameters", left=True),
        Column("Brier score"),
        Column("above the floor, 1e-3"),
        Column("difference to the default, 1e-3"),
        Column("calibration error"),
    ]
    notes = [
        "Mean squared error of a rollout's outcome over all visits after the first; lower is better. The floor, "
        f"{found.floor:.4f}, is what the true success rates would score. 95 % intervals: bootstrap over prompts. "
        "Fitted rules are chosen on one half of the prompts and scored on the other; the parameters shown are the "
        "choice on all."
    ]
    data = pd.DataFrame([_flat(row) for row in found.predictors]).drop(columns="calibration")
    return Table("predictors", "Prediction of a prompt's next visit", columns, rows, data, notes)


def _rule(rule: Rule | None) -> str:
    if rule is None:
        return MISSING
    a, b = rule.prior
    life = "no forgetting" if rule.half_life is None else f"half-life {rule.half_life:g}"
    return f"strength {a + b:g}, {life}" if rule.follows_pool else f"Beta({a:g}, {b:g}), {life}"


def allocator_table(found: Findings) -> Table:
    """A row an allocator: ratio of its variance to uniform's, and where its rollouts went."""
    best = min(row.variance_ratio for row in found.allocators if row.name != "hindsight")
    rows = [
        [
            Text(ALLOCATORS.get(row.name, row.name)),
            Text(f"{row.variance_ratio:.3f} [{row.low:.3f}, {row.high:.3f}]", bold=row.variance_ratio == best),
            Text(points(row.decided_share)),
            Text(f"{row.least}\N{EN DASH}{row.most}"),
        ]
        for row in found.allocators
    ]
    columns = [
        Column("allocator", left=True),
        Column("variance to uniform"),
        Column("rollouts in decided groups, %"),
        Column("n"),
    ]
    notes = [
        "Sum of p (1 - p) / n over prompts and visits relative to uniform allocation, p (1 - p) estimated from the "
        f"visit itself, which the allocator has not seen; {found.rollouts} rollouts per prompt; 95 % intervals: "
        "bootstrap over prompts. Decided groups: prompts whose recorded visit was all right or all wrong. Hindsight "
        "reads the visits before and after: not a rule, and not a bound either."
    ]
    data = pd.DataFrame([asdict(row) for row in found.allocators])
    return Table("allocators", "Variance that each allocator would have had", columns, rows, data, notes)


def summary(found: Findings) -> str:
    """The result in a few lines."""
    best = min(found.predictors, key=lambda row: row.brier)
    default = next(row for row in found.predictors if row.name == "default")
    rules = [row for row in found.allocators if row.name not in ("hindsight", "grpo")]
    lowest = min(rules, key=lambda row: row.variance_ratio)
    hindsight = next(row for row in found.allocators if row.name == "hindsight")
    gain, limit = 1 - lowest.variance_ratio, 1 - hindsight.variance_ratio
    return (
        f"{counted(found.prompts, 'prompt')}, {counted(found.visits, 'visit')}, success rate "
        f"{points(found.drift[0])} % at the first visit.\n"
        f"Prediction: best is {PREDICTORS[best.name]} ({_rule(best.rule)}), Brier score {best.brier:.4f}; the default "
        f"({_rule(default.rule)}) {default.brier:.4f}; the true rates would score {found.floor:.4f}.\n"
        f"Fixed prior and half-life that predict best: {_rule(found.fitted)}.\n"
        f"Allocation: best is {ALLOCATORS.get(lowest.name, lowest.name)}, {points(gain)} % less variance than uniform "
        f"under the p (1 - p) / n law; hindsight {points(limit)} %."
    )


def write_replay(found: Findings, out: Path) -> Path:
    """Write ``REPORT.md``, ``tables/`` and ``figures/`` into `out`; returns the report."""
    from analysis.figures_replay import write_replay_figures

    tables = [predictor_table(found), allocator_table(found)]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.write(out / "tables")
    drawn = {figure.name: figure for figure in write_replay_figures(found, out / "figures")}
    shown = {table.name: table.section() for table in tables}
    told = summary(found).replace("\n", "\n\n")
    body = (
        f"# Replay of {found.source}\n\n{told}\n\n"
        f"## Prediction\n\n{shown['predictors']}{drawn['calibration'].section()}"
        f"## Allocation\n\n{shown['allocators']}{drawn['allocators'].section()}"
        f"## Drift\n\n{drawn['success_rate'].section()}"
        "How it is computed: `docs/replay.md`.\n"
    )
    path = out / "REPORT.md"
    atomic_write_text(path, body)
    return path
