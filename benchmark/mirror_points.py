"""The points that the rows of a run become in a tracking store: metrics, evaluations, totals, curves at equal cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.jsonl import Row

CURVES: Mapping[str, str] = {
    "eval/average_pass_at_1": "average_pass_at_1",
    "train/accuracy_per_prompt_mean": "accuracy_per_prompt_mean",
    "train/tokens_per_rollout_mean": "tokens_per_rollout_mean",
    "policy/entropy_nats": "entropy_nats",
}
"""Metrics that are also read at equal costs, and their names there."""
CURVE_POINTS = 24
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_\-. :/]")


@dataclass(frozen=True)
class Point:
    """One value of one metric; `step` is the training spend in the primary currency."""

    key: str
    value: float
    step: int


def metric_points(row: Row, currency: str) -> list[Point]:
    """One step's metrics and its cumulative spend in every currency, as ``cost/<currency>``."""
    spent = {f"cost/{name}": value for name, value in row["cost"].items()}
    return _points({**row.get("metrics", {}), **spent}, int(row["cost"][currency]))


def timing_points(row: Row, currency: str) -> list[Point]:
    """Load of machine and process as ``system/<name>``, and the seconds that all sessions of the run took so far."""
    if "system" not in row:  # written before runs recorded it
        return []
    values = {f"system/{name}": value for name, value in row["system"].items()}
    return _points({**values, "time/elapsed_seconds": row["elapsed"]}, int(row["cost"][currency]))


def evaluation_points(rows: Sequence[Row], currency: str, ks: Iterable[int]) -> list[Point]:
    """Unbiased pass@k of one evaluation, per family and averaged over families; only where every n >= 2k.

    pass@k of an item with c of n samples correct is 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, eq. 1).
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(str(row["family"]), []).append(row)
    least = min(int(row["n"]) for row in rows)
    values: dict[str, float] = {}
    for k in ks:
        if k > 1 and 2 * k > least:
            continue
        for family, items in families.items():
            each = [1 - math.comb(row["n"] - row["c"], k) / math.comb(row["n"], k) for row in items]
            values[f"eval/{family}_pass_at_{k}"] = math.fsum(each) / len(each)
        average = math.fsum(values[f"eval/{family}_pass_at_{k}"] for family in families) / len(families)
        values[f"eval/average_pass_at_{k}"] = average
    values["eval/tokens_per_rollout_mean"] = sum(row["tokens"] for row in rows) / sum(row["n"] for row in rows)
    return _points(values, int(rows[0]["cost"][currency]))


def result_points(folder: Path, currency: str) -> list[Point]:
    """Totals of a finished run: measured currencies, fates, time by phase; empty before it has finished."""
    path = folder / "result.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    spent = result["spent"]
    values = {f"time/{phase}_seconds": value for phase, value in result.get("seconds", {}).items()}
    values |= {f"drawn/{fate}_rollouts": value for fate, value in result.get("drawn", {}).items()}
    values |= {f"cost/{name}": spent[name] for name in ("device_seconds", "verifier_seconds") if name in spent}
    values |= {"time/wall_seconds": result.get("wall_seconds"), "cost/overshoot": result.get("overshoot")}
    values["cost/evaluation_tokens"] = result.get("evaluation_tokens")
    values["cost/oracle_tokens"] = result.get("oracle", {}).get("tokens_generated")
    return _points(values, int(spent[currency]))


def at_equal_cost(
    points: Iterable[Point], tips: Mapping[str, tuple[int, float]], amount: int
) -> tuple[list[Point], dict[str, tuple[int, float]]]:
    """The main curves as ``curve/<name>`` at shares of the budget, which are the same costs in every run.

    Seeds spend differently in a step, and a chart averages runs only where their steps are equal. A value is
    interpolated between its neighbours, so it is known, and never changes, once the later one is.

    Args:
        points: new ones, ascending in step.
        tips: step and value of the last point of every curve before these.
        amount: the budget, in the currency of the steps.

    Returns:
        Points of the curves, and the new tips.
    """
    found, moved = [], dict(tips)
    for point in points:
        if point.key not in CURVES or point.step <= moved.get(point.key, (-1, 0.0))[0]:
            continue
        begin, value = moved.get(point.key, (point.step - 1, point.value))
        last = min(((point.step + 1) * CURVE_POINTS - 1) // amount, CURVE_POINTS)
        for share in range(begin * CURVE_POINTS // amount, last + 1):
            cost = amount * share // CURVE_POINTS
            if begin < cost <= point.step:
                reached = value + (point.value - value) * (cost - begin) / (point.step - begin)
                found.append(Point(f"curve/{CURVES[point.key]}", reached, cost))
        moved[point.key] = (point.step, point.value)
    return found, moved


def fresh(points: Iterable[Point], last: Mapping[str, int]) -> list[Point]:
    """The points whose step lies beyond the `last` one that the store has of their key, one a step."""
    first: dict[tuple[str, int], Point] = {}
    for point in points:
        if point.step > last.get(point.key, -1):
            first.setdefault((point.key, point.step), point)
    return list(first.values())


def _points(values: Mapping[str, Any], step: int) -> list[Point]:
    """Finite numbers only: a store makes infinity a number; the record keeps what is left out here."""
    return [
        Point(clean(key), float(value), step)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def clean(key: str) -> str:
    """`key` with what a store does not take in a key replaced by ``_``."""
    return _NOT_IN_KEYS.sub("_", key)
